"""What a pool of rollout actors is told, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolPatience:
    """How long is waited and how often tried. Failures and deaths that are nobody's fault count too."""

    start_timeout_s: float = 300.0  # without any actor that is placed and loaded
    straggler_s: float = 300.0  # after so long a unit is given to another actor as well; doubled until one is done
    straggler_factor: float = 4.0  # but not before so many times the median; after twice the time its actor is ended
    score_s: float = 900.0  # of one unit
    unit_failures: int = 2  # then its prompts are tried one by one
    prompt_failures: int = 3  # of a prompt alone; then it is set aside
    score_failures: int = 3  # of scorers at one unit; then its rewards are given up
    failures_in_a_row: int = 8  # times the number of actors, without any success in between: then the pool gives up
    speak_every_s: float = 30.0


@dataclass(frozen=True)
class PoolNeeds:
    """What each actor takes of the cluster. A scorer mostly waits, for a sandbox or for another machine."""

    cpus: float = 1.0
    gpus: float = 1.0  # where the device is one
    scorer_cpus: float = 0.0


@dataclass(frozen=True)
class PoolStats:
    """What the pool has and has done since it was made."""

    actors: int  # rollout actors that are placed and loaded
    restarts: int  # of rollout actors and scorers
    requeued: int  # times that a unit, or a prompt alone, lost its actor and was given to another
    reissued: int  # times that a straggler's work was given to a second actor
    set_aside: int  # prompts
    unscored: int  # units whose rewards were given up
    publish_s: float  # that the last publication took
    fetch_s: float  # the longest that an actor took to get and take over its weights
    busy_s: float  # that actors sampled, summed over them
