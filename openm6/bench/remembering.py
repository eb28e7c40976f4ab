"""What the records of a recipe leave in the memories of codes, as training shows them."""

from __future__ import annotations

from openm6.base.errors import DataError
from openm6.base.seeds import content_key
from openm6.data.mixture import Draw
from openm6.data.records import AUDIO_KEYS, IMAGE_KEYS, Record
from openm6.data.source import Source
from openm6.modalities.recall import Recall
from openm6.plan.examples import Remembered
from openm6.train.multimodal import MultimodalJob

WATCHED, EPOCHS = 4, 16  # records of a lesson that are watched, and how often each is shown
MEDIA = {"image": IMAGE_KEYS, "sound": AUDIO_KEYS}


class Watch:
    """Counts lesson by lesson. Sources that show the same files, as pairs do, are known by the name of the first."""

    def __init__(self, job: MultimodalJob) -> None:
        self._preparer = job.packer.preparer
        self._memories = memories_of(job)
        self._files: dict[tuple[str, str], set[bytes]] = {}  # of a modality and a source

    @property
    def limits(self) -> dict[str, float]:
        """Bytes that each memory holds at most."""
        return {name: float(memory.max_bytes) for name, memory in self._memories.items()}

    def count(self, component: int) -> dict[str, Remembered]:
        """What a lesson's files leave in each memory; the memories hold nothing but that afterwards."""
        self._forget()
        source = self._preparer.mixture.components[component].source
        met: dict[str, set[bytes]] = {modality: set() for modality in MEDIA}
        for number in range(min(WATCHED, len(source)) * EPOCHS):
            draw = Draw(component, number % EPOCHS, number // EPOCHS, number)
            self._preparer.sequence(draw)
            for modality, files in met.items():
                files |= files_in(self._preparer.mixture.record(draw), modality)
        return {
            name: self._remembered(memory, name.partition(".")[0], source, met)
            for name, memory in self._memories.items()
            if memory.arrays
        }

    def _remembered(
        self, memory: Recall, modality: str, source: Source, met: dict[str, set[bytes]]
    ) -> Remembered:
        count = len(memory.arrays)
        origin, files = self._origin(modality, source)
        variants = count / max(1, len(met[modality]))
        return Remembered(origin=origin, files=max(1, files), variants=variants, bytes=memory.bytes / count)

    def _origin(self, modality: str, source: Source) -> tuple[str, int]:
        """The first source that shows these files, and how many it shows."""
        own = self._files.get((modality, source.name)) or files_of(source, modality)
        for (kind, name), files in self._files.items():
            if kind == modality and 2 * len(own & files) > len(own):
                return name, len(files)
        self._files[modality, source.name] = own
        return source.name, len(own)

    def _forget(self) -> None:
        for memory in self._memories.values():
            memory.arrays.clear()
            memory.bytes = 0


def memories_of(job: MultimodalJob) -> dict[str, Recall]:
    """The memories of the job's modalities, such as `sound.heard`."""
    return {
        f"{name}.{place}": memory
        for name, modality in job.modalities.items()
        for place, memory in vars(modality).items()
        if isinstance(memory, Recall)
    }


def files_of(source: Source, modality: str) -> set[bytes]:
    """Digests of all pictures or sounds that a source shows in an epoch; records that are broken show none."""
    found: set[bytes] = set()
    for index in range(len(source)):
        try:
            found |= files_in(source[index], modality)
        except DataError:
            continue
    return found


def files_in(record: Record, modality: str) -> set[bytes]:
    """Digests of a record's pictures or sounds."""
    values = (record.get(key) for key in MEDIA[modality])
    return {content_key(value) for value in values if isinstance(value, bytes)}
