"""The pool of rollout actors: same tokens as in one process, whoever dies, hangs, comes late or gets what kills it."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from nanochat_ray.config import ModelConfig
from nanochat_ray.messages import (
    ClusterError,
    FinishedUnit,
    PassedOn,
    RolloutGroup,
    RolloutPrompt,
    RolloutUnit,
    SamplingParams,
    World,
)
from nanochat_ray.model.gpt import GPT
from nanochat_ray.rollout.trials import Trial
from nanochat_ray.stages.rollouts import OwnRollouts, RolloutSpec
from nanochat_ray.tasks.rl_task import RLTaskSpec
from tests.engine.tiny import byte_tokenizer, random_prompt
from tests.test_layers import loaded_by

CONFIG = ModelConfig(sequence_len=96, vocab_size=265, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL")
PARAMS = SamplingParams(max_tokens=6, num_samples=3, logprobs=0)
MOODS = ("plain", "slow", "raises", "hangs", "hangs-once", "kills-scorers", "asks-a-deadly-tool")
TASK = f"MOODS = {MOODS}" + """
import os

prompts = [{"id": f"{mood} {k}", "prompt": "?"} for mood in MOODS for k in range(100)]
eval_prompts = prompts

async def reward(conversation, completion):
    return sum(map(ord, completion)) % 7 / 6

def deadly(expression):
    if expression == "d":
        os._exit(1)

tools = (deadly,)
"""


def network(seed: int) -> GPT:
    model = GPT.build(CONFIG, compute_dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def tool_user() -> GPT:
    """A network without attention that answers X with a call of the tool `deadly`, and else at random."""
    chain = [ord("X"), byte_tokenizer().encode_special("<|python_start|>"), ord("d"),
             byte_tokenizer().encode_special("<|python_end|>")]  # fmt: skip
    model = GPT.build(CONFIG, compute_dtype=torch.float32)  # blocks add nothing before they have learned
    with torch.no_grad():
        embeddings, head = model.transformer.wte.weight, model.lm_head.weight
        embeddings[:, :5] = torch.eye(5)[4]
        embeddings[chain] = torch.eye(4, CONFIG.n_embd)
        head[chain] = -10.0 * torch.eye(5, CONFIG.n_embd)[4]
        for place, token in enumerate(chain[1:]):
            head[token, place] = 30.0
    return model


MODELS = {version: network(version) for version in range(4)}


def spec_in(folder: Path, name: str) -> RolloutSpec:
    byte_tokenizer().save(folder / "tokenizer")
    task = RLTaskSpec("file", Path("nowhere/moods.py"), source_text=TASK)
    return RolloutSpec(name, task, folder / "tokenizer", CONFIG, "cpu", "float32", max_rows=8, max_len=48)


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> RolloutSpec:
    return spec_in(tmp_path_factory.mktemp("pool"), "tiny rl")


def unit(number: int, version: int, moods: Sequence[str] = ("plain",) * 3, step: int = 0) -> RolloutUnit:
    """A unit whose prompts are named after what actors do when they meet them, see `moody`."""
    prompts = []
    for place, mood in enumerate(moods):
        k = 8 * number + place
        index = 100 * MOODS.index(mood) + k
        prompts.append(RolloutPrompt(f"{mood} {k}", index, tuple(random_prompt(5 + 7 * place, k)), seed=k))
    return RolloutUnit("train", step, number, version, tuple(prompts), PARAMS)


def moody(folder: Path) -> tuple[type, type]:
    """A rollout actor and a scorer that misbehave at prompts of certain names. Local classes travel whole."""
    from nanochat_ray.rollout.actors import RolloutActor
    from nanochat_ray.rollout.scorer import ScorerActor

    class Moody(RolloutActor):
        def sample(self, unit, weights):
            for prompt in unit.prompts:
                mood = prompt.id.split()[0]
                if mood == "raises":
                    raise ValueError("a prompt that is wrong")
                if mood == "hangs" or (mood == "hangs-once" and not (folder / prompt.id).exists()):
                    (folder / prompt.id).touch()
                    time.sleep(600)
                if mood == "slow":
                    time.sleep(0.3)
            return super().sample(unit, weights)

    class MoodyScorer(ScorerActor):
        def score(self, unit, rollouts):
            assert "torch" not in sys.modules and os.environ["CUDA_VISIBLE_DEVICES"] == ""
            if unit.prompts[0].id.startswith("kills-scorers"):
                os._exit(1)
            return super().score(unit, rollouts)

    return Moody, MoodyScorer


PoolMaker = Callable[..., "RolloutPool"]  # noqa: F821


@pytest.fixture(scope="module")
def make_pool(ray_cluster, spec, tmp_path_factory) -> Iterator[PoolMaker]:
    from nanochat_ray.rollout import starting
    from nanochat_ray.rollout.pool import RolloutPool
    from nanochat_ray.rollout.settings import PoolNeeds, PoolPatience

    def make(workers: int, own_spec: RolloutSpec = spec, cpus: float = 0.5, **patience) -> RolloutPool:
        calm, needs = PoolPatience(**patience), PoolNeeds(cpus=cpus)
        return RolloutPool(own_spec, workers, passed_on=PassedOn.here(), patience=calm, needs=needs)

    with pytest.MonkeyPatch.context() as patch:
        actor, scorer = moody(tmp_path_factory.mktemp("moods"))
        patch.setattr(starting, "RolloutActor", actor)
        patch.setattr(starting, "ScorerActor", scorer)
        yield make


@pytest.fixture(scope="module")
def pool(make_pool):
    """Two actors for tests that leave them in order."""
    pool = make_pool(2, straggler_s=2.0)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def alone(spec):
    """The groups of a unit as one process samples them."""
    own, groups = OwnRollouts(spec, World()), {}

    def sample(unit: RolloutUnit) -> tuple[RolloutGroup, ...]:
        if unit not in groups:
            own.publish(unit.version, MODELS[unit.version])
            [done] = own.finished([unit])
            groups[unit] = done.groups
        return groups[unit]

    return sample


def by_name(done: Iterator[FinishedUnit]) -> dict[str, tuple[RolloutGroup, ...]]:
    return {one.unit.name: one.groups for one in done}


def wait_until(true: Callable[[], object], what: str, patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def busy_pids(pool) -> list[int]:
    return [member.pid for member in pool._samplers.busy()]


def test_any_order_gives_what_one_process_gives(pool, alone):
    beats: list[int] = []
    pool._beat = lambda: beats.append(1)
    units = [unit(k, 0, ("plain",) * (1 + k % 3)) for k in range(5)]
    pool.publish(0, MODELS[0])
    pool.submit(units)
    last = by_name(pool.finished(units[3:]))  # asked for before those in front of them
    found = last | by_name(pool.finished(units[:3][::-1]))
    assert found == {one.name: alone(one) for one in units} and beats
    assert any(len(set(rollout.token_ids)) > 1 for group in found[units[2].name] for rollout in group.rollouts)
    again = [dataclasses.replace(one, step=1) for one in units]
    pool.submit(again[::-1])
    assert [groups for _, groups in sorted(by_name(pool.finished(again)).items())] == [alone(one) for one in units]


def test_two_versions_in_flight_and_old_ones_dropped(pool, alone):
    units = [unit(k, 1 + k % 2, ("slow", "plain"), step=2) for k in range(4)]
    pool.publish(1, MODELS[1])
    pool.submit(units[::2])
    pool.publish(2, MODELS[2])
    pool.submit(units[1::2])
    assert sorted(pool._weights) == [1, 2]
    assert by_name(pool.finished(units)) == {one.name: alone(one) for one in units}
    assert alone(units[0]) != alone(unit(0, 2, ("slow", "plain"), step=2))
    assert sorted(pool._weights) == [2]
    with pytest.raises(AssertionError, match="unpublished version 1"):
        pool.submit([unit(9, 1)])


def test_a_wrong_prompt_is_set_aside_by_name(pool, alone, caplog):
    pool.publish(2, MODELS[2])
    wrong = unit(0, 2, ("plain", "raises", "plain"), step=3)
    long = dataclasses.replace(wrong.prompts[2], token_ids=(1,) * (CONFIG.sequence_len + 1))
    wrong = dataclasses.replace(wrong, prompts=(*wrong.prompts[:2], long))
    pool.submit([wrong])
    [done] = pool.finished([wrong])
    first, raised, too_long = done.groups
    assert first == alone(dataclasses.replace(wrong, prompts=wrong.prompts[:1]))[0]
    assert raised.prompt == wrong.prompts[1] and not raised.rollouts
    assert raised.set_aside == "sampling it failed: ValueError: a prompt that is wrong"
    assert too_long.set_aside is not None and "97 tokens" in too_long.set_aside
    assert "prompt raises 1 is set aside" in caplog.text and pool.stats().set_aside == 2


def test_a_scorer_that_dies_is_no_reward_of_zero(pool, alone):
    fatal = unit(0, 2, ("kills-scorers", "plain"), step=4)
    pool.submit([fatal, unit(1, 2, step=4)])
    found = by_name(pool.finished([fatal, unit(1, 2, step=4)]))
    assert found[unit(1, 2, step=4).name] == alone(unit(1, 2, step=4))
    for group, right in zip(found[fatal.name], alone(fatal), strict=True):
        for rollout, other in zip(group.rollouts, right.rollouts, strict=True):
            assert rollout.reward is None and rollout.failure is not None and "scorer died" in rollout.failure
            assert (rollout.token_ids, rollout.logprobs) == (other.token_ids, other.logprobs)
    assert pool.stats().unscored == 1


def test_a_killed_actor_is_replaced_and_its_unit_done_again(pool, alone):
    before = pool.stats()
    units = [unit(k, 2 + k // 4, ("slow", "plain"), step=5) for k in range(8)]
    pool.publish(2, MODELS[2])
    pool.submit(units[:4])
    pool.publish(3, MODELS[3])  # the newcomer still has the older version to fetch
    pool.submit(units[4:])
    wait_until(lambda: busy_pids(pool), "nobody works")
    os.kill(busy_pids(pool)[0], signal.SIGKILL)
    assert by_name(pool.finished(units)) == {one.name: alone(one) for one in units}
    after = pool.stats()
    assert after.restarts > before.restarts and after.requeued > before.requeued
    assert after.set_aside == before.set_aside and after.busy_s > before.busy_s


@pytest.mark.slow
def test_a_straggler_is_overtaken_and_ended(pool, alone):
    pool.publish(3, MODELS[3])
    wait_until(lambda: pool.stats().actors == 2, "an actor's place stays empty")
    before = pool.stats()
    units = [unit(0, 3, ("hangs-once", "plain"), step=6), unit(1, 3, step=6)]
    pool.submit(units)
    assert by_name(pool.finished(units)) == {one.name: alone(one) for one in units}
    assert pool.stats().reissued > before.reissued
    wait_until(lambda: pool.stats().restarts > before.restarts, "the straggler still hangs")


def test_a_wrong_setting_surfaces_as_it_is(make_pool, spec, tmp_path):
    pool = make_pool(1, dataclasses.replace(spec, tokenizer_folder=tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="nothing"):
        pool.publish(0, MODELS[0])
        pool.submit([unit(0, 0)])
        list(pool.finished([unit(0, 0)]))
    pool.close()


@pytest.mark.slow
def test_weights_of_another_shape_are_no_prompts_fault(make_pool, spec):
    pool = make_pool(1)
    pool.publish(0, GPT.build(CONFIG.model_copy(update={"n_layer": 3})))
    pool.submit([unit(0, 0)])
    with pytest.raises(ValueError, match="version 0 of the weights: weights do not fit"):
        list(pool.finished([unit(0, 0)]))
    pool.close()
    with pytest.raises(ValueError, match="0 rollout workers"):
        make_pool(0)


def test_what_gets_no_place_says_so_and_gives_up(make_pool, caplog):
    pool = make_pool(2, cpus=100.0, start_timeout_s=1.0, speak_every_s=0.3)
    pool.publish(0, MODELS[0])
    pool.submit([unit(0, 0)])
    with pytest.raises(ClusterError, match=r"no rollout actor could be placed.*0 of 2 ready, 2 without a place; free"):
        list(pool.finished([unit(0, 0)]))
    assert "waiting for 1 units" in caplog.text
    with pytest.raises(ClusterError):
        pool.submit([unit(1, 0)])
    pool.close()
    pool.close()


def test_an_evaluation_goes_before_later_steps():
    train, later = Trial(unit(0, 0, step=5), 0, 2, 2), Trial(unit(1, 0, step=5), 1, 2, 2)
    evaluation = Trial(dataclasses.replace(unit(0, 0, step=4), split="val"), 2, 2, 2)
    opened = [*later.open, *train.open, *evaluation.open]
    assert [work.trial for work in sorted(opened, key=lambda work: work.order)] == [evaluation, train, later]


def test_whose_fault_an_error_is():
    from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

    from nanochat_ray.rollout.crew import fault_of

    lost = ObjectLostError("00", "here", "there")
    found = [fault_of(error) for error in (ActorDiedError(), lost, RayTaskError("f", "", lost), TimeoutError())]
    assert found == ["actor", "data", "data", "actor"]
    assert fault_of(RayTaskError("f", "", KeyError("k"))) == "code"


def test_a_unit_that_dies_by_chance_is_sampled_whole():
    trial = Trial(unit(0, 0), 0, unit_failures=2, prompt_failures=2)
    [whole] = trial.open
    trial.failed(whole, "killed")
    assert trial.open == [whole]
    trial.failed(whole, "killed")
    for place, work in enumerate([*trial.open]):
        assert work.unit.prompts == trial.unit.prompts[place : place + 1]
        trial.failed(work, "killed again")
        trial.scored(work, [RolloutGroup(work.unit.prompts[0], 0, ())], 1.0, 0.5, "a")
        trial.scored(work, [RolloutGroup(work.unit.prompts[0], 0, ())], 1.0, 0.5, "late")
    [again] = trial.open
    assert again.unit == trial.unit and trial.finished is None
    groups = tuple(RolloutGroup(prompt, 0, (), "as a whole") for prompt in trial.unit.prompts)
    trial.scored(again, groups, 2.0, 0.5, "b")
    assert trial.finished == FinishedUnit(trial.unit, groups, 5.0, 2.0, "a, b") and not trial.open


def test_a_unit_that_only_fails_whole_ends():
    trial = Trial(unit(0, 0), 0, unit_failures=2, prompt_failures=2)
    trial.failed(trial.open[0], "out of memory", hopeless=True)
    for work in [*trial.open]:
        trial.scored(work, [RolloutGroup(work.unit.prompts[0], 0, ())], 1.0, 0.0, "a")
    trial.failed(trial.open[0], "out of memory", hopeless=True)
    assert trial.finished is not None and [group.set_aside for group in trial.finished.groups] == [None] * 3


def test_a_whole_unit_that_comes_back_late_still_counts():
    trial = Trial(unit(0, 0), 0, unit_failures=1, prompt_failures=1)
    [whole] = trial.open
    trial.failed(whole, "late")
    trial.failed(trial.open[0], "dies")
    assert trial.set_aside == 1 and len(trial.open) == 2
    trial.failed(whole, "failed once more")
    trial.scored(whole, [RolloutGroup(prompt, 0, ()) for prompt in trial.unit.prompts], 1.0, 0.0, "a")
    assert trial.finished is not None and not any(group.set_aside for group in trial.finished.groups)


def test_scorers_load_no_torch():
    assert loaded_by(["nanochat_ray.rollout.scorer"], {"torch", "ray"}) == "[]"


def test_other_ranks_have_a_pool_that_does_nothing():
    from nanochat_ray.rollout.pool import ElsewhereRollouts

    source = ElsewhereRollouts()
    source.publish(0, MODELS[0])
    source.submit([unit(0, 0)])
    assert list(source.finished([unit(0, 0)])) == []
    source.close()


# --- slower ones


@pytest.mark.slow
def test_kills_all_the_time_change_no_token(make_pool, alone):
    pool, over = make_pool(3), threading.Event()

    def kill_now_and_then() -> None:
        for victim in range(4):
            wait_until(lambda: busy_pids(pool) or over.is_set(), "nobody works")
            if pids := busy_pids(pool):
                os.kill(pids[victim % len(pids)], signal.SIGKILL)
            time.sleep(0.5)

    units = [unit(k, 0, ("slow", "plain", "slow")) for k in range(10)]
    pool.publish(0, MODELS[0])
    pool.submit(units)
    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    found = by_name(pool.finished(units))
    over.set()
    killer.join()
    assert found == {one.name: alone(one) for one in units}
    assert pool.stats().restarts >= 2 and pool.stats().set_aside == 0
    pool.close()


@pytest.mark.slow
def test_poison_is_found(make_pool, alone, caplog):
    pool = make_pool(2, straggler_s=1.0, prompt_failures=2)
    deadly = unit(0, 0, ("plain", "asks-a-deadly-tool", "plain"))
    first, second, third = deadly.prompts
    deadly = dataclasses.replace(deadly, prompts=(first, dataclasses.replace(second, token_ids=(1, ord("X"))), third))
    hanging = unit(1, 0, ("hangs",))
    pool.publish(0, tool_user())
    pool.submit([deadly, hanging, unit(2, 0)])
    found = by_name(pool.finished([deadly, hanging, unit(2, 0)]))
    groups = found[deadly.name]
    assert [group.prompt for group in groups] == list(deadly.prompts)
    assert [bool(group.rollouts) for group in groups] == [True, False, True]
    assert groups[1].set_aside is not None and groups[1].set_aside.startswith("its actor died")
    assert "prompt asks-a-deadly-tool 1 is set aside" in caplog.text
    [hung] = found[hanging.name]
    assert hung.set_aside is not None and hung.set_aside.startswith("not sampled in")
    assert all(group.rollouts for group in found[unit(2, 0).name])
    assert pool.stats().set_aside == 2 and pool.stats().requeued >= 4
    pool.close()


@pytest.mark.slow
def test_who_comes_late_joins_and_who_freezes_goes(make_pool, alone, request):
    import ray

    class Blocker:
        def placed(self) -> None:
            return None

    def free() -> float:
        return ray.available_resources().get("CPU", 0.0)

    def used() -> float:
        return 0.5 * len([name for name in ray.util.list_named_actors() if name.startswith("rollout ")])

    wait_until(lambda: free() == ray.cluster_resources()["CPU"] - used(), "actors of other tests are still there")
    blocker = ray.remote(Blocker).options(num_cpus=free() - 0.5).remote()
    request.addfinalizer(lambda: ray.kill(blocker))
    ray.get(blocker.placed.remote())
    pool, units = make_pool(2, straggler_s=2.0), [unit(k, 0, ("slow",)) for k in range(6)]
    pool.publish(0, MODELS[0])
    pool.submit(units[:3])
    done = list(pool.finished(units[:3]))
    assert pool.stats().actors == 1 and len({one.by for one in done}) == 1
    ray.kill(blocker)
    wait_until(lambda: pool.stats().actors == 2, "the second actor never joins")
    pool.submit(units[3:])
    wait_until(lambda: len(busy_pids(pool)) == 2, "only one works")
    os.kill(busy_pids(pool)[0], signal.SIGSTOP)
    done += pool.finished(units[3:])
    assert by_name(iter(done)) == {one.name: alone(one) for one in units}
    wait_until(lambda: pool.stats().restarts == 1, "the frozen one is still there")
    pool.close()


@pytest.mark.slow
def test_inside_a_training_worker(ray_cluster, spec, alone, tmp_path):
    """Its actors lie outside the worker's placement group, and go when the worker is killed."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    units, result, named = [unit(k, 0) for k in range(2)], tmp_path / "result", dataclasses.replace(spec, name="orphan")

    def train(config: dict) -> None:
        from nanochat_ray.rollout.pool import RolloutPool
        from nanochat_ray.rollout.settings import PoolNeeds

        pool = RolloutPool(named, 1, passed_on=PassedOn({}), needs=PoolNeeds(cpus=0.5))
        pool.publish(0, network(0))
        pool.submit(units)
        found = by_name(pool.finished(units))
        result.write_text(repr([found[one.name] for one in units]))
        assert any(name.startswith("rollout orphan") for name in ray.util.list_named_actors())
        os.kill(os.getpid(), signal.SIGKILL)

    once = FailureConfig(max_failures=0, controller_failure_limit=0)
    trainer = TorchTrainer(
        train, scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="pool", storage_path=str(tmp_path / "ray"), failure_config=once),
    )  # fmt: skip
    with pytest.raises(ray.train.WorkerGroupError):
        trainer.fit()
    assert result.read_text() == repr([alone(one) for one in units])
    wait_until(lambda: not [name for name in ray.util.list_named_actors() if "orphan" in name], "orphans")
