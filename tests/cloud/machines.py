"""Machines of paper: what Ray would do over ssh is written down, and each `ray start` is remembered."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from ray.autoscaler.command_runner import CommandRunnerInterface


@dataclass
class Machines:
    """All that was run on them, in order."""

    commands: list[tuple[str, str]] = field(default_factory=list)  # node, command line
    files: list[tuple[str, str]] = field(default_factory=list)  # node, path there
    started: dict[str, dict[str, Any]] = field(default_factory=dict)  # node -> environment of its `ray start`
    broken: str = ""  # a command with this in it fails
    lock: Any = field(default_factory=threading.Lock)

    def runner(self, provider: Any, log_prefix: str, node_id: str, auth_config: Any, *_: Any, **__: Any) -> Runner:
        """In place of the provider's `get_command_runner`."""
        return Runner(self, node_id, provider)

    def run_on(self, node: str) -> list[str]:
        return [command for each, command in self.commands if each == node]

    def files_on(self, node: str) -> list[str]:
        return [path for each, path in self.files if each == node]


class Runner(CommandRunnerInterface):
    def __init__(self, machines: Machines, node: str, provider: Any) -> None:
        self.machines, self.node, self.provider = machines, node, provider

    def run(self, cmd: str | None = None, environment_variables: Any = None, **_: Any) -> str:
        with self.machines.lock:
            self.machines.commands.append((self.node, cmd or ""))
            if self.machines.broken and self.machines.broken in (cmd or ""):
                raise click.ClickException("SSH command failed.")
            if "ray start" in (cmd or ""):
                self.machines.started[self.node] = dict(environment_variables or {})
        return ""

    def run_rsync_up(self, source: str, target: str, options: Any = None) -> None:
        """Files that go to the head land in the home folder, where the head's autoscaler will look for them."""
        with self.machines.lock:
            self.machines.files.append((self.node, target))
        to = Path(target).expanduser()
        if not to.exists() and "head" in self.provider.node_tags(self.node).get("ray-node-type", ""):
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, to) if Path(source).is_dir() else shutil.copy(source, to)

    def run_rsync_down(self, source: str, target: str, options: Any = None) -> None:
        raise NotImplementedError

    def remote_shell_command_str(self) -> str:
        return f"ssh {self.node}"

    def run_init(self, *, as_head: bool, file_mounts: Any, sync_run_yet: bool) -> bool | None:
        return None
