"""SmolTalk, the smaller one (arXiv:2502.02737): general conversations."""

from __future__ import annotations

import logging
from typing import Literal

from nanochat_ray.tasks.custom_json import conversation_problem
from nanochat_ray.tasks.rows import DataSet, TaskSources, open_rows
from nanochat_ray.tasks.task import Conversation, Task

log = logging.getLogger(__name__)


class SmolTalk(Task):
    """General conversations, some with a system message. A row that is no conversation gives the next one instead.

    `bad_rows` holds the numbers of the bad rows that this process has met.
    """

    name = "SmolTalk"

    def __init__(
        self,
        split: Literal["train", "test"],
        sources: TaskSources,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start, stop, step)
        self.rows = open_rows(DataSet("smoltalk", "HuggingFaceTB/smol-smoltalk", "default", split), sources)
        self.bad_rows: set[int] = set()

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        n = len(self.rows)
        for row in (i % n for i in range(index, index + n)):
            messages = self.rows[row]["messages"]
            problem = conversation_problem(messages)
            if problem is None:
                return {"messages": messages}
            if row not in self.bad_rows:
                self.bad_rows.add(row)
                log.warning("SmolTalk row %d left out: %s (%d so far)", row, problem, len(self.bad_rows))
        raise ValueError(f"none of the {n} rows of SmolTalk is a conversation")
