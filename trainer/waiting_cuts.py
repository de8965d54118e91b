"""Which cuts wait to be published, and how one takes the place of several.

A delta joins the one before it: one delta leads over both. A delta with a view stays by itself, because its base is to
be of its version. When deltas cannot be published any more, or have grown beyond a full snapshot, a full one is wanted;
it takes the place of all that is *owed* by then, and takes over the feedback noted for it.

A cut that was held back is *kept* after its upload: what changed in it belongs to the next one that is served. It never
joins one before it that is to be served.
"""

from collections.abc import Sequence
from dataclasses import replace

from feature_store.manifest import Manifest
from trainer.cuts import Cut

_ALWAYS_WAITING_BYTES = 64 * 1024 * 1024  # of deltas; beyond it, and beyond a full snapshot, that is published instead


class WaitingCuts:
    """The mailbox. Not thread-safe: its user holds a lock.

    Attributes:
        wants_full: Whether the next cut is to be full.
        has_base_view: Whether a view for a base waits or is being read.
        owed: Stands for cuts that were not published and that no delta can follow; None: there is none.
        chain: What is published.
    """

    def __init__(self) -> None:
        self.wants_full = True
        self.has_base_view = False
        self.owed: Cut | None = None
        self.chain = Chain()
        self._cuts: list[Cut] = []  # at most one after each with a view, and after that one that is held
        self._kept: Cut | None = None

    def __bool__(self) -> bool:
        """Whether a cut waits."""
        return bool(self._cuts)

    @property
    def needs_full(self) -> bool:
        """Whether something is owed, and no full cut was asked for yet."""
        return self.owed is not None and not self.wants_full

    @property
    def nbytes(self) -> int:
        """Bytes of the deltas that wait."""
        return sum(cut.waiting_bytes for cut in self._cuts)

    @property
    def num_deltas(self) -> int:
        """How many deltas wait."""
        return sum(len(cut.deltas) for cut in (*self._cuts, *([self._kept] if self._kept else [])))

    def add(self, cut: Cut) -> None:
        """Add a cut. A delta that does not follow what waits, because a full one is wanted, is owed."""
        if self._kept is not None:
            cut, self._kept = cut.after(self._kept), None
        if cut.is_full:
            self.give_up()
            self._cuts, self.owed = [cut.after(self.owed) if self.owed else cut], None
            self.wants_full = False
        elif self.wants_full or self.owed:
            self._owe(cut)
        else:
            self.has_base_view = self.has_base_view or cut.view is not None
            if self._cuts and self._cuts[-1].view is None and not (cut.held and not self._cuts[-1].held):
                cut = cut.after(self._cuts.pop())
            self._cuts.append(cut)
            self._bound()

    def take(self) -> Cut:
        """The oldest; there is one."""
        return self._cuts.pop(0)

    def put_back(self, cut: Cut) -> None:
        """Put a delta back that could not be published; its base is made another time."""
        if self.owed is not None:
            self.give_up(cut)
            return
        cut = self.without_view(cut)
        self._cuts = [self._cuts[0].after(cut), *self._cuts[1:]] if self._cuts else [cut]
        self._bound()

    def keep(self, cut: Cut) -> None:
        """A cut that was held is done with: what changed in it belongs to the next one.

        After a full one that is a full one again.
        """
        was_full = cut.is_full
        cut = replace(self.without_view(cut), held=None)
        if was_full:
            self.give_up(cut)
            self._kept, self.owed = self.owed, None  # nothing is owed to the store: it is the gate that said no
            self.wants_full = True
        elif self.owed is not None:
            self.give_up(cut)
        elif self._cuts:
            self._cuts[0] = self._cuts[0].after(cut)
            self._bound()
        else:
            self._kept = cut
            if cut.waiting_bytes > self._most_bytes:
                self._kept, self.wants_full = replace(cut, dense={}, deltas=()), True

    def give_up(self, *cuts: Cut) -> None:
        """Owe these cuts and then all that wait: only a full one can follow them."""
        gone, self._cuts = [*cuts, *self._cuts], []
        for cut in gone:
            self._owe(self.without_view(cut))

    def without_view(self, cut: Cut) -> Cut:
        """The cut without its view, which is closed."""
        if cut.view is not None and not cut.is_full:
            self.has_base_view = False
        return cut.without_view()

    def _owe(self, cut: Cut) -> None:
        bare = replace(cut.without_view(), dense={}, deltas=())
        self.owed = bare.after(self.owed) if self.owed else bare

    def _bound(self) -> None:
        """Where more waits than a full snapshot has, that is published instead, as soon as the store takes it."""
        if self.nbytes > self._most_bytes:
            self.give_up()

    @property
    def _most_bytes(self) -> int:
        return max(_ALWAYS_WAITING_BYTES, self.chain.base_bytes)


class Chain:
    """The newest full payload of what is published, and the deltas after it.

    Attributes:
        base_bytes: Bytes of that payload, 0 before the first.
    """

    def __init__(self) -> None:
        self.base_bytes = 0
        self._deltas: list[tuple[int, int]] = []  # version, bytes

    def add(self, manifest: Manifest) -> None:
        """A version was published."""
        if manifest.kind == "full":
            self.base_bytes, self._deltas = manifest.total_bytes, []
        else:
            self._deltas.append((manifest.version, manifest.total_bytes))

    def begin_with(self, manifests: Sequence[Manifest]) -> None:
        """What is published, as the store has it: a full payload, and the deltas after it."""
        self.base_bytes, self._deltas = 0, []
        for manifest in manifests:
            self.add(manifest)

    def begin_at(self, base: Manifest) -> None:
        """A version got a base."""
        self.base_bytes = base.total_bytes
        self._deltas = [(version, size) for version, size in self._deltas if version > base.version]

    def is_longer_than(self, length: int, bytes_ratio: float) -> bool:
        """Whether there are more deltas than that, or more bytes of them than this multiple of the full payload's."""
        total_bytes = sum(size for _, size in self._deltas)
        return len(self._deltas) > length or total_bytes > bytes_ratio * self.base_bytes
