import json
import subprocess
import sys
import time

import pytest
import yaml

from nanochat_ray.config import (
    BaseEvalSettings,
    ChatEvalSettings,
    ChatSettings,
    PretrainSettings,
    RunSettings,
    Settings,
    SFTSettings,
    TokenizerSettings,
)
from nanochat_ray.flags import REFUSED, Flags, Section, dump, nearest, read_flags

RUN = Section("run", RunSettings())
PRETRAIN = [RUN, Section("pretrain", PretrainSettings())]
SFT = [RUN, Section("sft", SFTSettings())]
SPEEDRUN = [
    RUN,
    *[
        Section(key, settings, prefix=key)
        for key, settings in {
            "tokenizer": TokenizerSettings(), "pretrain": PretrainSettings(), "base_eval": BaseEvalSettings(),
            "sft": SFTSettings(), "chat_eval": ChatEvalSettings(),
        }.items()
    ],
]


def read(sections: list[Section], line: str, **options) -> Flags:
    return read_flags("A job.", sections, line.split(), **options)


def refused(capsys, sections: list[Section], line: str, **options) -> str:
    with pytest.raises(SystemExit) as left:
        read(sections, line, **options).all()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.partition("error: ")[2].strip()


# --- nanochat's command lines ------------------------------------------------------------------------------------


def test_the_speedrun_pretraining_parses():
    line = "--depth=24 --target-param-data-ratio=8 --device-batch-size=16 --run=speedrun"
    flags = read(PRETRAIN, line)
    expected = PretrainSettings(depth=24, target_param_data_ratio=8, device_batch_size=16)
    assert flags.settings(PretrainSettings) == expected
    assert flags.settings(RunSettings) == RunSettings(run="speedrun")


def test_the_cpu_run_pretraining_parses():
    line = (
        "--depth=6 --head-dim=64 --window-pattern=L --max-seq-len=512 --device-batch-size=32 --total-batch-size=16384 "
        "--eval-every=100 --eval-tokens=524288 --core-metric-every=-1 --sample-every=100 --num-iterations=5000 "
        "--run=dummy"
    )
    assert read(PRETRAIN, line).settings(PretrainSettings) == PretrainSettings(
        depth=6, head_dim=64, window_pattern="L", max_seq_len=512, device_batch_size=32, total_batch_size=16384,
        eval_every=100, eval_tokens=524288, core_metric_every=None, sample_every=100, num_iterations=5000,
    )


def test_the_sft_lines_parse():
    line = (
        "--max-seq-len=512 --device-batch-size=32 --total-batch-size=16384 --eval-every=200 --eval-tokens=524288 "
        "--num-iterations=1500 --run=dummy"
    )
    assert read(SFT, line).settings(SFTSettings) == SFTSettings(
        max_seq_len=512, device_batch_size=32, total_batch_size=16384, eval_every=200, eval_tokens=524288,
        num_iterations=1500,
    )
    assert read(SFT, "--device-batch-size=16 --run=speedrun").settings(SFTSettings).device_batch_size == 16


@pytest.mark.parametrize(
    ("settings", "line", "expected"),
    [
        (BaseEvalSettings(), "--device-batch-size=1 --split-tokens=16384 --max-per-task=16",
         BaseEvalSettings(device_batch_size=1, split_tokens=16384, max_per_task=16)),
        (BaseEvalSettings(), "--eval core --max-per-task -1", BaseEvalSettings(eval="core")),
        (ChatEvalSettings(), "-i sft -a ARC-Easy|MMLU -t 0.5 -m 64 -n 2 -k 0 -b 4 -s 7 -x 10",
         ChatEvalSettings(task_name="ARC-Easy|MMLU", temperature=0.5, max_new_tokens=64, num_samples=2, top_k=0,
                          batch_size=4, step=7, max_problems=10)),
        (ChatSettings(), "-i base -t 0.6 -k 50 -p hello", ChatSettings(source="base", prompt="hello")),
        (TokenizerSettings(), "--max-chars=2000000000 --vocab-size 32768", TokenizerSettings()),
    ],
)
def test_the_other_jobs_parse(settings: Settings, line: str, expected: Settings):
    flags = read([RUN, Section("job", settings)], line + " -g d12 --device-type cpu")
    assert flags.settings(type(settings)) == expected
    assert flags.settings(RunSettings) == RunSettings(model_tag="d12", device_type="cpu")


def test_the_main_job_has_dotted_flags():
    line = (
        "--preset cpu --model-tag a --pretrain.depth 6 --sft.no-load-optimizer --base-eval.eval bpb "
        "--chat_eval.step=3"
    )
    flags = read(SPEEDRUN, line, extra=lambda parser: parser.add_argument("--preset"))
    assert flags.args.preset == "cpu" and flags.settings(RunSettings).model_tag == "a"
    assert flags.settings(PretrainSettings).depth == 6 and flags.settings(SFTSettings).load_optimizer is False
    assert flags.settings(BaseEvalSettings).eval == "bpb" and flags.settings(ChatEvalSettings).step == 3


def test_flags_stand_over_a_presets_values():
    """A value that only the preset makes valid is judged together with the preset."""
    preset = PretrainSettings(depth=4, max_seq_len=256, num_iterations=500, total_batch_size=8192)
    flags = read(SPEEDRUN, "--pretrain.total-batch-size 2560 --pretrain.num-iterations -1")
    found = flags.settings(PretrainSettings, preset)
    assert found == preset.model_copy(update={"total_batch_size": 2560, "num_iterations": None})


# --- forms of a value --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--ray", True), ("--ray 1", True), ("--ray=true", True), ("--ray on", True), ("", True),
        ("--no-ray", False), ("--ray 0", False), ("--ray=false", False), ("--ray no", False), ("--ray --no-ray", False),
        ("--no_ray", False),
    ],
)
def test_booleans(line, expected):
    assert read(PRETRAIN, line + " --depth 3").settings(RunSettings).ray is expected


def test_a_boolean_that_may_be_unset():
    lines = ("", "--compile", "--no-compile", "--compile -1")
    assert [read(SFT, line).settings(SFTSettings).compile for line in lines] == [None, True, False, None]
    assert read(SFT, "--load-optimizer 0").settings(SFTSettings).load_optimizer is False


def test_both_spellings():
    one = read(PRETRAIN, "--device_batch_size=8 --target_param_data_ratio 20 --model_tag my_tag").all()
    other = read(PRETRAIN, "--device-batch-size 8 --target-param-data-ratio=20 --model-tag=my_tag").all()
    assert one == other and one["run"].model_tag == "my_tag"


@pytest.mark.parametrize("name", ["num-iterations", "target-flops", "target-param-data-ratio", "total-batch-size",
                                  "eval-every", "core-metric-max-per-task", "save-every", "resume-from-step"])
@pytest.mark.parametrize("form", ["--{} -1", "--{}=-1", "--{}=-1.0"])
def test_minus_one_is_unset(name, form):
    line = form.format(name) + ("" if name == "num-iterations" else " --num-iterations 10")
    assert getattr(read(PRETRAIN, line).settings(PretrainSettings), name.replace("-", "_")) is None


def test_minus_one_is_a_number_or_a_text_where_nothing_may_be_unset(capsys):
    assert read(PRETRAIN, "--seed -1 --run -1").settings(PretrainSettings).seed == -1
    assert read(PRETRAIN, "--run -1").settings(RunSettings).run == "-1"
    assert refused(capsys, PRETRAIN, "--eval-tokens -1") == "--eval-tokens -1: must be > 0"


def test_empty_is_unset_for_texts():
    run = read(PRETRAIN, "--device-type= --model-tag=").settings(RunSettings)
    assert run.device_type is None and run.model_tag is None


def test_a_mixture_is_several_words():
    line = "--mixture smoltalk gsm8k*4 json=a.jsonl*2 --seed 1"
    assert read(SFT, line).settings(SFTSettings).mixture == ("smoltalk", "gsm8k*4", "json=a.jsonl*2")


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--device-batch-size 0", "--device-batch-size 0: must be >= 1"),
        ("--depth=x", "--depth x: must be a whole number"),
        ("--num-iterations 2.5", "--num-iterations 2.5: must be a whole number, or -1 for unset"),
        ("--eval-every 0", "--eval-every 0: must be > 0, or -1 for unset"),
        ("--warmdown-ratio 1.5", "--warmdown-ratio 1.5: must be <= 1"),
        ("--matrix-lr fast", "--matrix-lr fast: must be a number"),
        ("--matrix-lr nan", "--matrix-lr nan: must be a finite number"),
        ("--device-type gpu", "--device-type gpu: must be 'cpu', 'cuda' or 'mps'"),
        ("--ray maybe", "--ray maybe: must be 0 or 1"),
        ("--depth", "argument --depth: expected one argument"),
        ("depth", "what is 'depth' for? Only flags are taken"),
        ("--dept 6", "unknown flag --dept; did you mean --depth?"),
        ("--pretrain.depth 6", "unknown flag --pretrain.depth; did you mean --depth?"),
        ("--xyzzy 6", "unknown flag --xyzzy"),
        ("-q", "unknown flag -q"),
    ],
)
def test_one_readable_line(capsys, line, message):
    assert refused(capsys, PRETRAIN, line) == message


def test_all_that_is_wrong_with_a_stage_is_named(capsys):
    assert refused(capsys, PRETRAIN, "--depth 0 --head-dim x --seed y").splitlines() == [
        "--depth 0: must be >= 1", "--head-dim x: must be a whole number", "--seed y: must be a whole number",
    ]


def test_checks_over_several_fields_say_the_fix(capsys):
    message = refused(capsys, PRETRAIN, "--total-batch-size 1000 --max-seq-len 512")
    assert "1000" in message and "the nearest that is: 1024" in message


@pytest.mark.parametrize(("text", "expected"), [("3", (3, 3)), ("2:8", (2, 8))])
def test_workers_are_a_number_or_a_range(text, expected):
    assert RunSettings(workers=text).worker_range == expected


@pytest.mark.parametrize("text", ["0", "4:2", "a", "1:2:3", "-1"])
def test_workers_that_are_none(text):
    with pytest.raises(ValueError, match="workers"):
        RunSettings(workers=text)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_flags_without_meaning_here_are_refused_with_the_reason(capsys, name):
    for form in (f"--{name}=1", f"--{name.replace('-', '_')} 1"):
        assert refused(capsys, PRETRAIN, form) == f"--{name} has no meaning here: {REFUSED[name]}"


def test_the_main_job_shows_where_a_stages_flag_is(capsys):
    assert refused(capsys, SPEEDRUN, "--depth 6") == "unknown flag --depth; did you mean --pretrain.depth?"
    assert "--pretrain.eval-every, --sft.eval-every" in refused(capsys, SPEEDRUN, "--eval-every 6")


def test_abbreviations_are_not_taken(capsys):
    assert "unknown flag --num-iter" in refused(capsys, PRETRAIN, "--num-iter 6")


# --- config files ------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "depth: 6\npretrain: {head-dim: 64, seed: 7}\nrun: named\npretrain.warmup_steps: 3\neval-every: -1\n"
    )
    flags = read(PRETRAIN, f"--seed 8 --config {path}")
    assert flags.settings(PretrainSettings) == PretrainSettings(
        depth=6, head_dim=64, seed=8, warmup_steps=3, eval_every=None
    )
    assert flags.settings(RunSettings).run == "named"


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_saved_settings_can_be_fed_back(tmp_path, suffix):
    line = "--depth 6 --target-flops 1e18 --matrix-lr 1e-5 --no-ray --compile 0 -g x --eval-every -1"
    before = read(PRETRAIN, line).all()
    path = tmp_path / f"config.{suffix}"
    path.write_text(json.dumps(dump(before)) if suffix == "json" else yaml.safe_dump(dump(before)))
    assert read_flags("A job.", PRETRAIN, ["--config", str(path)]).all() == before
    mixture = SFTSettings(mixture=("a", "b*2"))
    path.write_text(json.dumps(dump(mixture)))
    assert read(SFT, f"--config {path}").settings(SFTSettings) == mixture


def test_the_jobs_own_options_may_stand_in_the_file(tmp_path, capsys):
    def extra(parser):
        parser.add_argument("--preset", choices=["cpu", "d12"])

    path = tmp_path / "run.yaml"
    path.write_text("preset: d12\npretrain: {depth: 3}\nsft:\n")
    flags = read(SPEEDRUN, f"--config {path}", extra=extra)
    assert flags.args.preset == "d12" and flags.settings(PretrainSettings).depth == 3
    assert read(SPEEDRUN, f"--config {path} --preset cpu", extra=extra).args.preset == "cpu"
    path.write_text("preset: d99")
    assert "preset d99: must be one of cpu, d12" in refused(capsys, SPEEDRUN, f"--config {path}", extra=extra)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dept: 6", "unknown setting dept; did you mean depth?"),
        ("pretrain: {dept: 6}", "unknown setting pretrain.dept; did you mean pretrain.depth?"),
        ("sft: {seed: 6}", "unknown setting sft"),
        ("pretrain: 6", "unknown setting pretrain"),
        ("- depth", "a mapping of names to values is expected"),
        ("depth: [", "not valid YAML"),
        ("run: !!python/object/apply:os.system ['echo no']", "not valid YAML"),
        ("depth: 0", "depth 0: must be >= 1"),
        ("pretrain: {depth: null}", "pretrain.depth None: must be a whole number"),
        ("run: {run: 12}", "run.run 12: must be text; in a file, put it in quotes"),
    ],
)
def test_a_bad_file_is_named_and_nothing_is_executed(tmp_path, capsys, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    error = refused(capsys, PRETRAIN, f"--config {path}")
    assert str(path) in error and message in error and "no\n" not in error


def test_a_missing_file_is_an_error(tmp_path, capsys):
    assert "No such file" in refused(capsys, PRETRAIN, f"--config {tmp_path / 'none.yaml'}")
    assert "--config" in refused(capsys, PRETRAIN, f"--config {tmp_path}")


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read(PRETRAIN, f"--config {tmp_path / 'empty.yaml'}").all() == read(PRETRAIN, "").all()


# --- help --------------------------------------------------------------------------------------------------------


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as left:
        read_flags("A job.", SPEEDRUN, ["--help"], epilog="More.")
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for section in SPEEDRUN:
        for name in section.fields:
            assert f"{section.flag(name)} " in shown
    assert "--pretrain.depth INT layers; the one dial that sets everything else (default: 20)" in shown
    assert "(default: on; --no-ray turns it off)" in shown and shown.endswith("More.")


def test_help_is_fast_and_loads_nothing_heavy():
    code = (
        "import sys; from nanochat_ray.flags import Section, read_flags; from nanochat_ray.config import *\n"
        "try: read_flags('x', [Section('run', RunSettings()), Section('pretrain', PretrainSettings())], ['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'ray', 'numpy', 'yaml', 'wandb'} & set(sys.modules))"
    )
    started = time.monotonic()
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("set()\n")
    assert time.monotonic() - started < 5  # far above what it takes, for a busy machine


def test_nearest():
    assert nearest("cat", ["cpu", "smoke", "d12"]) == ""
    assert nearest("smok", ["cpu", "smoke", "d12"]) == "; did you mean smoke?"
