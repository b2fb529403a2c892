"""From one installed version to another: the other version's worker takes everything, or the old one serves on.

The path is a death's: the old worker is killed once the new one has the mounts, and what was in flight goes to it.
The old version's template stays until every device is in the new worker, so that there is a way back.
"""

import time

from virtiofsd_nydus import log as logs
from virtiofsd_nydus.errors import Failure
from virtiofsd_nydus.keeper import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from virtiofsd_nydus.keeper.frontends import FrontEnd
    from virtiofsd_nydus.keeper.loop import Loop
    from virtiofsd_nydus.keeper.mounts import Mounts
    from virtiofsd_nydus.keeper.workers import Template, Worker

    class Owner(Protocol):
        """What an upgrade asks of the keeper."""

        loop: Loop
        mounts: Mounts
        front_ends: dict[int, FrontEnd]
        template: Template | None
        worker: Worker | None
        python: str
        stopping: bool

        def say(self, level: int, text: str, **fields: object) -> None: ...

        def spawn_template(self, python: str) -> Template: ...

        def fork_worker(self, template: Template, *, waits: bool = False) -> Worker: ...

        def take_over(self, worker: Worker, died: bool) -> None: ...

        def warm(self) -> None: ...


UPGRADE_S = 30.0  # for the other version's worker to be ready
ANSWER_S = 2.0  # for the client that asked for it to get its answer
PROVEN_S = 10.0  # the version before it is kept so long, at most
WARM_AFTER_S = 2.0


class Upgrade:
    """The way from one version to another, step by step. A failure before `switched` leaves the old version serving,
    one after it brings the old version back."""

    def __init__(self, asker: "Worker", python: str, mounts_gen: int, old_python: str) -> None:
        self.asker, self.python, self.mounts_gen, self.old_python = asker, python, mounts_gen, old_python
        self.template: Template | None = None
        self.worker: Worker | None = None
        self.old_template: Template | None = None
        self.switched = False


class Upgrades:
    """Of one keeper, one at a time."""

    def __init__(self, keeper: "Owner") -> None:
        self._keeper = keeper
        self._upgrade: Upgrade | None = None

    def begin(self, asker: "Worker", python: str) -> None:
        if self._upgrade is not None or asker is not self._keeper.worker or self._keeper.stopping:
            asker.send(protocol.UPGRADED, {"error": "another one is under way"})
            return
        upgrade = Upgrade(asker, python or self._keeper.python, self._keeper.mounts.gen, self._keeper.python)
        self._upgrade = upgrade
        try:
            upgrade.template = self._keeper.spawn_template(upgrade.python)
        except OSError as error:
            self._refuse(f"{upgrade.python}: {error.strerror}")
            return
        self._keeper.loop.after(UPGRADE_S, lambda: self._late(upgrade))

    def _late(self, upgrade: Upgrade) -> None:
        if self._upgrade is upgrade and not upgrade.switched:
            self._refuse(f"its worker was not ready within {UPGRADE_S:g} s")

    def _refuse(self, why: str) -> None:
        """The old version serves on."""
        upgrade, self._upgrade = self._upgrade, None
        if upgrade is None:
            return
        self._keeper.say(logs.ERROR, f"the upgrade is refused: {why}", python=upgrade.python)
        upgrade.asker.send(protocol.UPGRADED, {"error": why})
        for process in (upgrade.worker, upgrade.template):
            if process is not None:
                process.purpose = "the upgrade is refused"
                process.kill()

    def _is_ready(self, upgrade: Upgrade) -> None:
        """It has the mounts. May it have the devices?"""
        facts = upgrade.worker.facts if upgrade.worker is not None else None
        lacks = [one for one in self._keeper.front_ends.values() if not one.device.fits(facts or {})]
        if lacks:
            self._refuse(f"it lacks features that front-end {lacks[0].number} uses")
        elif upgrade.mounts_gen != self._keeper.mounts.gen:
            self._refuse("mounts were changed meanwhile: try again")
        else:
            upgrade.asker.send(protocol.UPGRADED, {"error": None})
            self._keeper.loop.after(ANSWER_S, self._end_old_worker)

    def _end_old_worker(self) -> None:
        """Its client has the answer, so it may go; what it has in flight is the next one's."""
        upgrade = self._upgrade
        if upgrade is not None and not upgrade.switched and upgrade.worker is not None and upgrade.worker.facts:
            upgrade.asker.purpose = "upgrade"
            upgrade.asker.kill()

    # ---- what the keeper tells

    def template_greeted(self, template: "Template", failure: Failure | None) -> bool:
        """False: it is not the other version's."""
        upgrade = self._upgrade
        if upgrade is None or template is not upgrade.template:
            return False
        if failure is not None:
            self._refuse(str(failure))
        else:
            upgrade.worker = self._keeper.fork_worker(template, waits=True)
        return True

    def template_ended(self, template: "Template") -> None:
        if self._upgrade is not None and template is self._upgrade.template and not self._upgrade.switched:
            self._refuse("its program ended")

    def worker_ready(self, worker: "Worker") -> bool:
        """False: it is not the other version's."""
        if self._upgrade is None or worker is not self._upgrade.worker:
            return False
        self._is_ready(self._upgrade)
        return True

    def worker_failed(self, worker: "Worker", failure: Failure) -> bool:
        """It could not start. False: it is not the other version's."""
        if self._upgrade is None or worker is not self._upgrade.worker:
            return False
        self._refuse(str(failure))
        return True

    def answered(self, worker: "Worker") -> None:
        """The client that asked has its answer."""
        if self._upgrade is not None and worker is self._upgrade.asker:
            self._end_old_worker()

    def worker_ended(self, worker: "Worker") -> bool:
        """A worker ended. Whether that is all there is to do."""
        upgrade = self._upgrade
        if upgrade is None:
            return False
        if worker is upgrade.worker and not upgrade.switched:
            self._refuse(f"its worker died{': ' if worker.last_words() else ''}{worker.last_words()}")
            worker.close_errors()
            return True
        if worker is upgrade.worker:
            self._fall_back(upgrade)
            return False
        if worker is upgrade.asker and worker.purpose == "upgrade" and not self._keeper.stopping:
            worker.close_errors()
            self._switch(upgrade)
            return True
        if worker is upgrade.asker:
            self._refuse("the worker died meanwhile")
        return False

    def _switch(self, upgrade: Upgrade) -> None:
        """The old worker is gone: the new one gets the devices."""
        worker = upgrade.worker
        assert worker is not None
        upgrade.switched = True
        upgrade.old_template, self._keeper.template, self._keeper.python = (
            self._keeper.template,
            upgrade.template,
            upgrade.python,
        )
        worker.ready_at = time.monotonic()
        self._keeper.take_over(worker, False)
        worker.send(protocol.GO)
        self._keeper.say(
            logs.INFO, "upgraded", python=upgrade.python, package=upgrade.template and upgrade.template.package
        )
        self._keeper.loop.after(WARM_AFTER_S, self._keeper.warm)
        self._keeper.loop.after(PROVEN_S, lambda: self._end(upgrade))
        self.note_restored()

    def restore_failed(self, worker: "Worker") -> None:
        """A device could not be made again in a worker."""
        upgrade = self._upgrade
        if upgrade is not None and upgrade.switched and worker is upgrade.worker:
            worker.kill()  # and what follows of that

    def note_restored(self) -> None:
        """Once every device is in the new worker, the old version is not needed any more."""
        upgrade = self._upgrade
        if (
            upgrade is not None
            and upgrade.switched
            and all(one.device.rests for one in self._keeper.front_ends.values())
        ):
            self._end(upgrade)

    def _end(self, upgrade: Upgrade) -> None:
        if self._upgrade is not upgrade:
            return
        self._upgrade = None
        if upgrade.old_template is not None:
            upgrade.old_template.kill()

    def _fall_back(self, upgrade: Upgrade) -> None:
        """The new version cannot go on with what the old one left: back to that."""
        self._upgrade = None
        if self._keeper.template is not None:
            self._keeper.template.kill()
        self._keeper.template, self._keeper.python = upgrade.old_template, upgrade.old_python
        self._keeper.say(logs.ERROR, "the new version could not go on: back to the old one", python=upgrade.python)
