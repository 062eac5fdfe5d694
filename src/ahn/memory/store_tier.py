"""The store: some of the tokens that the window evicts are kept exactly, chosen by a score.

Letters: as in `ahn.memory.layer`, and P slots of the store, per key/value head; E tokens that a batch evicts from the
window, L scores kept, O queries that are observed.

Slots of a buffer: [sinks S | store P | ring W]; those of the store are made when the window evicts its first token.
Each head keeps tokens of its own, and evicts one of its own at each step: it is written into the cell, then the query
reads (`ahn.ops.eviction` says which one).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ahn.cells.base import Cell
from ahn.memory.batch import ForwardBatch, LayerBatch, gather
from ahn.memory.evicted import Evicted, Evictions
from ahn.memory.positions import Positions
from ahn.memory.store_buffer import StoringMemory
from ahn.memory.tier import KeptTier, LastTier, Put
from ahn.ops import dispatch, eviction
from ahn.ops.banded import attend_one, attend_slots, attend_window, visible
from ahn.ops.eviction import by_head
from ahn.ops.ranks import TOKEN, Outcome, empty_ranks, position_of
from ahn.ops.softmax import AttentionOutput
from ahn.ops.specs import KeptKeys, Queries, StoredRotation, Window
from ahn.stores.base import Store


class Arrivals(NamedTuple):
    """The tokens of a piece of text, with the keys that their queries meet."""

    new: LayerBatch
    sinks: Tensor  # keys of the sinks [B, M, S, H], or fewer
    window: Tensor  # keys of the window before and of the piece, in order, [B, M, K, H]


class Pushed(NamedTuple):
    """The tokens that a batch evicts from the window, from its first token on that evicts one. All layers share it."""

    positions: Tensor  # [R, E], at least 0
    real: Tensor  # bool [R, E], whether there is one
    back: Tensor  # [R, E], how many tokens of its span of `store_span` are older: spans start behind the sinks


class StoreTier(KeptTier):
    """The tokens with the best scores, P per key/value head.

    Args:
        store: scores tokens. span: tokens that are judged together. cell: of the tier below, if there is one.
    """

    def __init__(self, store: Store, span: int, positions: Positions, cell: Cell | None) -> None:
        self.store, self.span, self.positions, self.cell = store, span, positions, cell
        self.sizes = positions.sizes

    @property
    def grid(self) -> int:  # type: ignore[override]
        return self.store.grid

    @property
    def window(self) -> int:
        """W: a layer with full attention has no store."""
        assert self.sizes.window is not None
        return self.sizes.window

    @property
    def scores_kept(self) -> int:
        """L: the scores that spans may still ask for."""
        return self.window + self.span - 1

    def memory(self, gate_width: int) -> StoringMemory:
        kept, reads_state = self.scores_kept, self.store.reads_state
        return StoringMemory(self.window, self.sizes.sinks, gate_width, self.sizes.store, kept, reads_state)

    def is_full(self, batch: ForwardBatch) -> bool:
        return not batch.filling if batch.on_device else int(batch.start.min()) >= self.sizes.lossless

    def is_periodic(self, batch: ForwardBatch) -> bool:
        return batch.periodic if batch.on_device else any(map(self.store.is_periodic, batch.start.tolist()))

    # Many tokens, up to the next multiple of the store's grid.
    def put(self, new: LayerBatch, window: tuple[Tensor, ...], memory: StoringMemory) -> Put | None:
        batch, sinks = new.batch, self.sizes.sinks
        (keys, values), before = memory.kept, slice(memory.store.stop)
        arrivals = Arrivals(new, keys[:, :, :sinks], window[0])
        ranks = memory.ranks
        outcome, trail = self._resolve(arrivals, memory.trail(batch), ranks, memory.snapshot)
        memory.keep_trail(batch, trail)
        if outcome is None or ranks is None:
            return None
        steps = outcome.evicted.shape[-1]
        oldest = window[0].shape[2] - steps - self.window
        pushed = [t[:, oldest : oldest + steps] if t.dim() == 3 else t[:, :, oldest : oldest + steps] for t in window]
        candidates = (
            torch.cat([keys[:, :, before], self._into_store(pushed[0], batch)], 2),
            torch.cat([values[:, :, before], pushed[1]], 2),
        )
        rivals = [t[:, :, sinks:] for t in candidates]
        if memory.inputs is not None:
            rivals.append(self._heads(torch.cat([memory.inputs[:, memory.store], pushed[2]], 1)))
        return Put(KeptKeys(*candidates, *self._seen(batch, ranks, outcome), steps), rivals, outcome)

    def commit(self, put: Put, evicted: int, memory: StoringMemory) -> Evicted | None:
        memory.commit(put.rivals, put.outcome, self._heads)
        if self.cell is None or evicted <= 0:
            return None
        k, v, inputs = (by_head(t, put.outcome.evicted[..., -evicted:]) for t in put.rivals)
        k = self.positions.from_store(k, put.outcome.evicted_ranks[..., -evicted:])
        return Evicted(k, v, _joined(inputs))

    def after(self, new: LayerBatch, memory: StoringMemory) -> None:
        memory.keep_state(new.batch, self.grid)

    # One token a row.
    def put_one(self, new: LayerBatch, evicted: tuple[Tensor, ...], memory: StoringMemory) -> tuple[Tensor, ...]:
        batch = new.batch
        fused = batch.on_device and self.is_full(batch)
        fused = fused and dispatch.pick_one_token(new.k.device.type).name == "triton"
        if batch.first >= self.sizes.sinks + self.window:
            evicted = (self.displace_fused if fused else self.displace)(evicted, batch, memory)
        gate = self.store.gate_form() if fused else None
        if gate is not None:
            from ahn.ops.kernels import moves

            with batch.side_stream(new.x):
                moves.put_score(gate, memory, batch.start, new.x)
        else:
            memory.put_score(batch, self.score(new, memory.snapshot))
        return evicted

    def attend_one(self, new: LayerBatch, memory: StoringMemory, in_parts: bool) -> Any:
        batch, (keys, values) = new.batch, memory.kept
        queries = Queries(new.q, self.positions.of_kept(new.q, batch), new.scale)
        kept = self.sizes.sinks + memory.shift
        if self.is_full(batch):
            return attend_one(queries, keys, values, kept, None, in_parts)
        slots = memory.shift + min(batch.first + 1, self.sizes.sinks + self.window)
        filled = memory.filled(batch, slots)
        return attend_slots(queries, keys[:, :, :slots], values[:, :, :slots], kept, filled)

    def after_one(self, new: LayerBatch, memory: StoringMemory) -> None:
        if self.is_periodic(new.batch):
            if self.store.every and new.batch.first >= self.sizes.sinks:
                memory.add_scores(new.batch, self._received_once(new, memory), self.store.every)
            memory.keep_state(new.batch, self.grid)

    def displace(self, pushed: tuple[Tensor, ...], batch: ForwardBatch, memory: StoringMemory) -> tuple[Tensor, ...]:
        """The token that the ring has evicted, one a row, against the slots of each head: returns the tokens that the
        heads evict, their keys as the cell is given them.

        Args:
            pushed: key, value [B, M, 1, H], and gate inputs [B, 1, G * N].
        """
        scores, which = memory.trail_of_one(batch, self.span), self._pushed(batch, pushed[0].device)
        priority = eviction.pool(lambda at: gather(scores, at, 2), which.back, self.span)
        new = eviction.rank(priority, which.positions, which.real)
        tokens = [self._into_store(pushed[0], batch), pushed[1], *map(self._heads, pushed[2:])]
        (k, v, *inputs), ranks = memory.swap(tokens, new, self._heads)
        return self.positions.from_store(k, ranks), v, *map(_joined, inputs)

    def displace_fused(
        self, pushed: tuple[Tensor, ...], batch: ForwardBatch, memory: StoringMemory
    ) -> tuple[Tensor, ...]:
        """`displace` in one kernel; where that does not know the rotation, plain torch rotates."""
        from ahn.ops.kernels import moves

        rotary, unrotates = self.positions.rotary, self.positions.unrotates
        enters = self.positions.moves_stored is not None
        out = int(not unrotates) if enters else -int(unrotates)
        rotates = rotary is not None and (enters or unrotates)
        frequencies = rotary.frequencies if rotates and rotary is not None else None
        if rotates and frequencies is None:
            tokens = self._into_store(pushed[0], batch), *pushed[1:]
            (k, *rest), ranks = moves.displace(memory, batch.start, self.span, None, tokens)
            return self.positions.from_store(k, ranks), *rest
        rotation = StoredRotation(frequencies, enters, out, -int(enters))
        return moves.displace(memory, batch.start, self.span, rotation, pushed)[0]

    # A whole sequence.
    def sequence(
        self, new: LayerBatch, last: LastTier | None, evictions: Evictions | None
    ) -> tuple[AttentionOutput, Tensor | None]:
        """Finds without a gradient which tokens are evicted, piece by piece; then takes them from where they stand."""
        batch, kv_heads, length, _ = new.k.shape
        device, sinks = new.k.device, self.sizes.sinks
        ranks = empty_ranks(batch, kv_heads, self.sizes.store, device)
        trail = torch.zeros(batch, kv_heads, self.scores_kept, device=device)
        until = torch.full((batch, kv_heads, length + 1), length, device=device)  # and one that is nobody's
        state = torch.zeros(batch, *(() if last is None else last.state_shape or ()), device=device)
        reads = []
        for at, piece in new.batch.on_grid(self.grid):
            low, high, _ = at.indices(length)
            part = new.part(at, piece)
            window = new.k[:, :, max(0, low - self.window) : high]
            with torch.no_grad():
                arrivals = Arrivals(part, new.k[:, :, : min(sinks, high)], window)
                outcome, trail = self._resolve(arrivals, trail, ranks, state)
            tokens = torch.zeros(batch, kv_heads, high - low, dtype=torch.int64, device=device)
            if outcome is not None:
                ranks, steps = outcome.ranks, outcome.evicted_ranks.shape[-1]
                gone = position_of(outcome.evicted_ranks).where(outcome.evicted_ranks >= TOKEN, length)
                until.scatter_(-1, gone, torch.arange(high - steps, high, device=device).expand_as(gone))
                tokens[..., high - low - steps :] = gone.clamp(max=length - 1)
            if last is None or new.gate_inputs is None or evictions is None:
                continue
            k, v, inputs = (by_head(t, tokens) for t in (new.k, new.v, self._heads(new.gate_inputs)))
            evicted = Evicted(self.positions.unrotated(k, tokens), v, _joined(inputs))
            read, state = last.recur(part.q, evicted, evictions.part(at), state)
            reads.append(read)
        attended = self._attend_sequence(new, until[..., :length])
        return attended, torch.cat(reads, 2) if reads else None

    def _attend_sequence(self, new: LayerBatch, until: Tensor) -> AttentionOutput:
        """`until` [B, M, T]: the step at which each token is evicted from the store."""
        k, v, batch, sinks = new.k, new.v, new.batch, self.sizes.sinks
        gone = min(batch.length, max(sinks, batch.length - self.window))  # sinks, and tokens evicted from the window
        since = torch.arange(gone, device=k.device)
        since = torch.where(since < sinks, since, since + self.window)
        stored = torch.cat([k[:, :, :sinks], self._into_store(k[:, :, sinks:gone], batch)], 2)
        kept = KeptKeys(stored, v[:, :, :gone], since[None, None], until[..., :gone], max(0, gone - sinks))
        start, nothing = batch.start_on(new.q.device), (k[:, :, :0],) * 2
        return attend_window(new.queries, nothing, (k, v), start, Window(self.window, sinks), kept)

    # Which tokens are evicted.
    def _resolve(
        self, arrivals: Arrivals, trail: Tensor, ranks: Tensor | None, state: Tensor | None
    ) -> tuple[Outcome | None, Tensor]:
        """The outcome for the tokens of a piece that evict one from the window, None if none does, and the scores of
        the last L tokens after the piece.

        Args:
            trail: these scores before it, [B, M, L]. ranks: of the store. state: at the last multiple of the grid.
        """
        new, batch = arrivals.new, arrivals.new.batch
        score = self.score(new, state)
        scores = torch.cat([trail, score.expand(*trail.shape[:2], batch.length)], -1)
        received = self._received(arrivals) if self.store.every else None
        first, outcome = self._first(batch), None
        if ranks is not None and first < batch.length:

            def take(at: Tensor) -> Tensor:
                found = gather(scores, at + first, 2)
                if received is None:
                    return found
                given, before = received
                return found + gather(given.flatten(2), before[:, first:] * given.shape[-1] + at + first, 2)

            pushed = self._pushed(batch, new.k.device)
            priority = eviction.pool(take, pushed.back, self.span)
            outcome = eviction.evict(ranks, eviction.rank(priority, pushed.positions, pushed.real))
        if received is not None:
            scores = scores + received[0][:, :, -1]
        if not batch.padded and len(set(batch.counts)) == 1:
            return outcome, scores[:, :, batch.counts[0] : batch.counts[0] + self.scores_kept]
        last = torch.tensor(batch.counts)[:, None] + torch.arange(self.scores_kept)
        return outcome, gather(scores, last, 2)

    def _first(self, batch: ForwardBatch) -> int:
        """The first token of `batch` that evicts one from the window of some row."""
        return max(0, self.sizes.sinks + self.window - batch.first)

    def _pushed(self, batch: ForwardBatch, device: torch.device) -> Pushed:
        return batch.memo(("pushed", device), lambda: self._make_pushed(batch, device))

    def _make_pushed(self, batch: ForwardBatch, device: torch.device) -> Pushed:
        first, sinks = self._first(batch) if batch.length > 1 else 0, self.sizes.sinks
        positions = batch.positions(device)[:, first:] - self.window
        real = (positions >= sinks) & batch.real(device)[:, first:]
        return Pushed(positions.clamp(min=0), real, (positions - sinks) % self.span)

    def _into_store(self, k: Tensor, batch: ForwardBatch) -> Tensor:
        """Keys [B, M, E, H] that `batch` evicts from the window, as they are stored."""
        if self.positions.moves_stored is None or not k.shape[2]:
            return k
        return self.positions.into_store(k, batch, self._pushed(batch, k.device).positions)

    @torch.no_grad()
    def score(self, new: LayerBatch, state: Tensor | None) -> Tensor:
        """Scores of new tokens [B, M, T], or what broadcasts to it."""
        k, v, inputs = new.k, new.v, new.gate_inputs
        positions = new.batch.positions(k.device)

        def error() -> Tensor:
            assert self.cell is not None and inputs is not None and state is not None
            mine = self.positions.unrotated(k, positions[:, None].expand(*k.shape[:3]))
            groups = self.cell.num_heads // k.shape[1]
            mine, values = (t.repeat_interleave(groups, 1) for t in (mine, v))
            return self.cell.error(mine, values, self.cell.gates(inputs), state).unflatten(1, (-1, groups)).mean(2)

        return self.store.score(new.x, positions, error).float().expand(*k.shape[:3])

    def _received(self, arrivals: Arrivals) -> tuple[Tensor, Tensor]:
        """The attention that tokens get from the observed queries of a piece, added up.

        Returns:
            [B, M, O + 1, L + T]: attention to the tokens of trail and piece from the first 0, 1, ... O observed ones;
            [R, T]: how many of these are before each query.
        """
        new, batch, device, every = arrivals.new, arrivals.new.batch, arrivals.new.k.device, self.store.every
        first = -batch.start % every
        index = first[:, None] + torch.arange(0, batch.length, every)  # of the observed queries, [R, O]
        real = (index < torch.tensor(batch.counts)[:, None]).to(device)
        before = (torch.arange(batch.length) - first[:, None] + every - 1).div(every, rounding_mode="floor")
        at = index.clamp(max=batch.length - 1)
        q, q_kept = gather(new.q, at, 2), gather(new.queries_of_kept, at, 2)
        positions = (batch.start[:, None] + index).to(device)[..., None]
        count = arrivals.window.shape[2]
        keys = batch.start_on(device)[:, None] + torch.arange(batch.length - count, batch.length, device=device)
        seen = [
            torch.arange(arrivals.sinks.shape[2], device=device) <= positions,
            visible(positions, keys[:, None], self.sizes.sinks, self.window),
        ]
        pairs = [(q_kept, arrivals.sinks), (q, arrivals.window)]
        given = _weights(pairs, torch.cat(seen, -1), new.scale)[..., -count:]
        given = given.where(real[:, None, :, None], 0).cumsum(2)  # a query behind the end may see nothing
        given = F.pad(given, (self.scores_kept + batch.length - count, 0, 1, 0))
        return given, before.clamp(max=index.shape[1]).to(device)

    def _received_once(self, new: LayerBatch, memory: StoringMemory) -> Tensor:
        """The attention that the tokens of the ring, slot by slot [B, M, W or fewer], get from the one query a row."""
        q, batch, sinks, (keys, _) = new.q, new.batch, self.sizes.sinks, memory.kept
        kept = sinks + memory.shift
        pairs = [(self.positions.of_kept(q, batch), keys[:, :, :sinks]), (q, keys[:, :, kept:])]
        filled = torch.arange(keys.shape[2] - memory.shift, device=q.device) <= batch.start_on(q.device)[:, None]
        return _weights(pairs, filled[:, None], new.scale)[:, :, 0, sinks:]

    def _seen(self, batch: ForwardBatch, ranks: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
        """Since when and until when the queries of `batch` see sinks, slots and newcomers: [B, M, S + P + E] each."""

        def make(slots: Tensor) -> Tensor:
            sinks = torch.arange(self.sizes.sinks, device=device) - batch.start_on(device)[:, None]
            newcomers = torch.arange(first, batch.length, device=device)
            shape = (*ranks.shape[:2], -1)
            return torch.cat([sinks[:, None].expand(shape), slots, newcomers.expand(shape)], -1)

        device, first = ranks.device, batch.length - outcome.evicted.shape[-1]
        if self.is_full(batch):
            since = batch.memo(("since", device), lambda: make(torch.full_like(ranks, -1)))
        else:
            since = make(torch.where(ranks >= TOKEN, -1, batch.length))
        return since, F.pad(eviction.until(outcome) + first, (self.sizes.sinks, 0), value=batch.length)

    def _heads(self, inputs: Tensor) -> Tensor:
        """Gate inputs [B, T, G * N] by key/value head, as a view [B, M, T, G, N / M]."""
        assert self.cell is not None
        split = inputs.unflatten(-1, (self.cell.num_gates, self.store.kv_heads, -1))
        return split.permute(0, 3, 1, 2, 4)


def _joined(inputs: Tensor) -> Tensor:
    """The opposite of `_heads`."""
    return inputs.permute(0, 2, 3, 1, 4).flatten(2)


def _weights(pairs: list[tuple[Tensor, Tensor]], seen: Tensor, scale: float) -> Tensor:
    """Softmax of queries [B, N, O, H], each over the keys [B, M, K, H] of all pairs that are `seen` [R, O, K]: the mean
    over the heads of a group, [B, M, O, K]."""
    scores = []
    for q, k in pairs:
        q = q.unflatten(1, (k.shape[1], -1))  # heads that share keys become more queries
        scores.append((q.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, q.shape[2:4]).float() * scale)
    masked = torch.cat(scores, -1).masked_fill(~seen[:, None, None], -torch.inf)
    return masked.softmax(-1).mean(2)
