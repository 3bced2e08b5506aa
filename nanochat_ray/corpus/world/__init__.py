"""The embedded corpus: a small invented world, generated from a seed, to train on and to chat about."""

from nanochat_ray.corpus.world.build import World, build_world, write_world
from nanochat_ray.corpus.world.questions import Question, question_pool, training_problems

__all__ = ["Question", "World", "build_world", "question_pool", "training_problems", "write_world"]
