"""The simulated processes of one host: they outlive clusterd, and die with the host (S7)."""

import attrs


@attrs.define
class Process:
    vm: str
    epoch: int
    pid: int
    images: tuple[str, ...]
    is_paused: bool = False


@attrs.define
class SimHypervisor:
    processes: dict[str, Process] = attrs.field(factory=dict)

    def find(self, vm: str, epoch: int) -> Process | None:
        process = self.processes.get(vm)
        return process if process is not None and process.epoch == epoch else None
