"""The memory of a layer with a store: some of what leaves the window is kept exactly, the rest goes into the cell.

Letters: as in `ahn.memory.layer`, and P places of the store, per key/value head; E tokens that leave the window in a
span, L scores kept, O queries that are observed.

Slots of a buffer: [sinks S | store P | ring W]; the places are made when the first token leaves the window. Each head
keeps tokens of its own, and loses one of its own at each step: the loser is written, then the query reads
(`ahn.ops.eviction` says who loses).

With clipped sink positions a query sees the store as it sees the sinks, never further than S + W: a key that enters is
turned to position S, right behind the sinks, so that stored tokens are all at distance W, at which they left the
window. One that loses its place is turned on to where the cell expects it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ahn import stores
from ahn.config import AHNConfig
from ahn.errors import ConfigError
from ahn.memory.buffer import LayerMemory
from ahn.memory.layer import AHNLayer
from ahn.memory.leaving import Turn
from ahn.memory.span import Span, gather
from ahn.memory.store_buffer import StoringMemory
from ahn.ops import dispatch, eviction
from ahn.ops.banded import attend_one, attend_slots, attend_window, visible
from ahn.ops.eviction import by_head
from ahn.ops.ranks import TOKEN, Outcome, empty_ranks, position_of
from ahn.ops.rotary import Rotary
from ahn.ops.softmax import Softmax
from ahn.ops.specs import Far
from ahn.stores.base import Store


class Arrivals(NamedTuple):
    """The tokens of a piece of text, after compaction."""

    span: Span
    q: Tensor  # [B, N, T, H]
    q_far: Tensor  # as sinks and store meet them
    k: Tensor  # [B, M, T, H]
    v: Tensor
    x: Tensor  # [B, T, D]
    inputs: Tensor | None  # [B, T, G * N]
    sinks: Tensor  # keys of the sinks [B, M, S, H], or fewer
    near: Tensor  # keys of the window before and of the piece, in order, [B, M, K, H]
    scale: float


class Pushed(NamedTuple):
    """The tokens that those of a span push out, the first of it that do and all behind it: the same in all layers."""

    positions: Tensor  # [R, E], at least 0
    real: Tensor  # bool [R, E], whether there is one
    back: Tensor  # [R, E], how many tokens of its span of `store_span` are older: they start behind the sinks


class StoringLayer(AHNLayer):
    """`AHNLayer` whose lossless tokens are sinks, store and window."""

    store: Store

    def __init__(self, attention: Any, config: AHNConfig, rotary: Rotary | None) -> None:
        super().__init__(attention, config, rotary)
        assert config.store is not None
        kind = stores.get(config.store)
        if kind.reads_state and self.cell is None:
            raise ConfigError(f"store={config.store!r} asks what the cell does not know: expected a cell")
        base = attention.config
        kv_heads = getattr(base, "num_key_value_heads", None) or base.num_attention_heads
        self.store = kind(base.hidden_size, kv_heads, attention.layer_idx, device=attention.o_proj.weight.device)
        self.size, self.span = config.store_size, config.store_span

    @property
    def has_far(self) -> bool:
        return True

    @property
    def lossless(self) -> int:
        return super().lossless + self.size

    def steps_on_device(self, span: Span) -> bool:
        """Once the store is full: which places are still empty is looked up on the host."""
        return int(span.start.min()) >= self.lossless

    def due(self, span: Span) -> bool:
        return span.due if span.on_device else any(map(self.store.due, span.start.tolist()))

    @property
    def reach(self) -> int:
        """W: a layer that keeps everything has no store."""
        assert self.window is not None
        return self.window

    @property
    def scores_kept(self) -> int:
        """L: the scores that spans may still ask for."""
        return self.reach + self.span - 1

    def memory(self) -> LayerMemory:
        return StoringMemory(
            self.reach, self.sinks, self.gate_width, self.size, self.scores_kept, self.store.reads_state
        )

    def compile_for_training(self) -> None:
        """Nothing: who loses depends on the data."""

    # Three ways through a layer, as in AHNLayer: many tokens, one, a whole sequence.
    def _many(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, inputs: Tensor | None, span: Span, memory: Any, scale: float
    ) -> Tensor:
        pieces = [
            self._piece(q[:, :, at], k[:, :, at], v[:, :, at], x[:, at], _part(inputs, at), piece, memory, scale)
            for at, piece in span.on_grid(self.store.grid)
        ]
        return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]

    def _piece(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        inputs: Tensor | None,
        span: Span,
        memory: StoringMemory,
        scale: float,
    ) -> Tensor:
        """Tokens up to the next multiple of the store's grid."""
        old, new = memory.window_before(span), tuple(t for t in (k, v, inputs) if t is not None)
        window = tuple(torch.cat(pair, dim=1 if pair[0].dim() == 3 else 2) for pair in zip(old, new, strict=True))
        memory.put(span, k, v, inputs)
        (keys, values), sinks, far = memory.kept, slice(self.sinks), slice(memory.places.stop)
        q_far = self._seen_by_sinks(q, span)
        arrivals = Arrivals(span, q, q_far, k, v, x, inputs, keys[:, :, sinks], window[0], scale)
        ranks = memory.ranks
        outcome, trail = self._resolve(arrivals, memory.trail(span), ranks, memory.snapshot)
        memory.keep_trail(span, trail)
        start, near = span.start_on(q.device), (window[0], window[1])
        if outcome is None or ranks is None:
            pair = keys[:, :, sinks], values[:, :, sinks]
            return attend_window(q, q_far, pair, near, start, self.reach, scale)[0].transpose(1, 2)

        steps = outcome.losers.shape[-1]
        oldest = window[0].shape[2] - steps - self.reach
        leaving = [t[:, oldest : oldest + steps] if t.dim() == 3 else t[:, :, oldest : oldest + steps] for t in window]
        behind = (
            torch.cat([keys[:, :, far], self._turn_in(leaving[0], span)], 2),
            torch.cat([values[:, :, far], leaving[1]], 2),
        )
        rivals = [t[:, :, self.sinks :] for t in behind]
        if memory.inputs is not None:
            rivals.append(self._heads(torch.cat([memory.inputs[:, memory.places], leaving[2]], 1)))
        seen = Far(*behind, *self._seen(span, ranks, outcome), steps)
        nothing = keys[:, :, :0], values[:, :, :0]
        out, norm = attend_window(q, q_far, nothing, near, start, self.reach, scale, seen, self.sinks)
        memory.settle(rivals, outcome, self._heads)
        out, first = out.transpose(1, 2), max(0, self.lossless - span.first)
        tokens = span.length - first
        if self.cell is None or tokens <= 0:
            return out
        k, v, held = (by_head(t, outcome.losers[..., -tokens:]) for t in rivals)
        k = self._turn_out(k, outcome.lost[..., -tokens:])
        turns = self._leaving(span, q.device, first)
        fla = self.cell.uses_fla(q)
        ready = self._prepare(q[:, :, first:], k, v, _joined(held), turns, fla)
        read, state = self.cell.run(*ready, memory.compressed, fla)
        memory.compressed.copy_(state)
        memory.keep_state(span, self.store.grid)
        combined = self._combine(out[:, first:], norm[:, :, first:], read, x[:, first:], turns)
        return torch.cat([out[:, :first], combined], 1) if first else combined

    def _one(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, span: Span, memory: Any, scale: float) -> Tensor:
        out = super()._one(q, k, v, x, span, memory, scale)
        if self.due(span):
            if self.store.every and span.first >= self.sinks:
                memory.add_scores(span, self._received_once(q, span, memory, scale), self.store.every)
            memory.keep_state(span, self.store.grid)
        return out

    def _attend_one(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        inputs: Tensor | None,
        span: Span,
        memory: Any,
        scale: float,
        in_parts: bool = False,
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """As in AHNLayer, but for who leaves: what each head loses."""
        lost = self._exchange(k, v, inputs, span, memory)
        fused = span.on_device and dispatch.one_token(k.device.type).name == "triton"
        if span.first >= self.sinks + self.reach:
            lost = (self._displace_fused if fused else self._displace)(lost, span, memory)
        gate = self.store.gate_form() if fused else None
        if gate is not None:
            from ahn.ops.kernels import decode

            with span.aside(x):
                decode.put_score(gate, memory, span.start, x)
        else:
            memory.put_score(span, self._score(k, v, x, inputs, span, memory.snapshot))
        keys, values = memory.kept
        q_far, far = self._seen_by_sinks(q, span), self.sinks + memory.shift
        if span.on_device or self.steps_on_device(span):
            return attend_one(q, q_far, keys, values, far, None, scale, in_parts), lost
        slots = memory.shift + min(span.first + 1, self.sinks + self.reach)
        filled = memory.filled(span, slots)
        return attend_slots(q, q_far, keys[:, :, :slots], values[:, :, :slots], far, filled, scale), lost

    def _displace(self, pushed: tuple[Tensor, ...], span: Span, memory: StoringMemory) -> tuple[Tensor, ...]:
        """What the ring has pushed out, one token a row, against the places of each head: returns what each head loses,
        its key as the cell is given it.

        Args:
            pushed: key, value [B, M, 1, H], and gate inputs [B, 1, G * N].
        """
        near, which = memory.trail_of_one(span, self.span), self._pushed(span, pushed[0].device)
        priority = eviction.pool(lambda at: gather(near, at, 2), which.back, self.span)
        new = eviction.rank(priority, which.positions, which.real)
        tokens = [self._turn_in(pushed[0], span), pushed[1], *map(self._heads, pushed[2:])]
        (k, v, *held), ranks = memory.swap(tokens, new, self._heads)
        return self._turn_out(k, ranks), v, *map(_joined, held)

    def _displace_fused(self, pushed: tuple[Tensor, ...], span: Span, memory: StoringMemory) -> tuple[Tensor, ...]:
        """The same in one kernel, where it knows the rotation; else that is plain torch."""
        from ahn.ops import specs
        from ahn.ops.kernels import decode

        (rotary,) = self.rotary
        out = int(not self.turns_back) if self._moves is not None else -int(self.turns_back)
        turns = rotary is not None and (self._moves is not None or self.turns_back)
        frequencies = rotary.frequencies if turns and rotary is not None else None
        if turns and frequencies is None:
            tokens = self._turn_in(pushed[0], span), *pushed[1:]
            (k, *rest), ranks = decode.displace(memory, span.start, self.span, None, *tokens)
            return self._turn_out(k, ranks), *rest
        enters = self._moves is not None
        turn = specs.Turn(frequencies, enters, out, -int(enters))
        return decode.displace(memory, span.start, self.span, turn, *pushed)[0]

    def _whole(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, inputs: Tensor | None, span: Span, scale: float
    ) -> Tensor:
        """Who loses is found without a gradient, piece by piece; then losers are taken from where they stand."""
        batch, kv_heads, length, _ = k.shape
        q_far, writing = self._seen_by_sinks(q, span), max(span.counts) > self.lossless
        ranks = empty_ranks(batch, kv_heads, self.size, k.device)
        trail = torch.zeros(batch, kv_heads, self.scores_kept, device=k.device)
        until = torch.full((batch, kv_heads, length + 1), length, device=k.device)  # and one that is nobody's
        state = torch.zeros(batch, *(self.state_shape or ()), device=k.device)
        turns, reads = self._leaving(span, q.device) if writing else None, []
        for at, piece in span.on_grid(self.store.grid):
            low, high, _ = at.indices(length)
            arrivals = Arrivals(
                piece,
                q[:, :, at],
                q_far[:, :, at],
                k[:, :, at],
                v[:, :, at],
                x[:, at],
                _part(inputs, at),
                k[:, :, : min(self.sinks, high)],
                k[:, :, max(0, low - self.reach) : high],
                scale,
            )
            with torch.no_grad():
                outcome, trail = self._resolve(arrivals, trail, ranks, state)
            tokens = torch.zeros(batch, kv_heads, high - low, dtype=torch.int64, device=k.device)
            if outcome is not None:
                ranks, steps = outcome.ranks, outcome.lost.shape[-1]
                lost = position_of(outcome.lost).where(outcome.lost >= TOKEN, length)
                until.scatter_(-1, lost, torch.arange(high - steps, high, device=k.device).expand_as(lost))
                tokens[..., high - low - steps :] = lost.clamp(max=length - 1)
            if self.cell is None or inputs is None or turns is None:
                continue
            k_lost, v_lost, held = (by_head(t, tokens) for t in (k, v, self._heads(inputs)))
            fla = self.cell.uses_fla(q)
            ready = self._prepare(
                q[:, :, at], self._unturned(k_lost, tokens), v_lost, _joined(held), turns.part(at), fla
            )
            read, state = self.cell.run(*ready, state, fla)
            reads.append(read)
        out, norm = self._attend_whole(q, q_far, k, v, until[..., :length], span, scale)
        out = out.transpose(1, 2)
        return self._combine(out, norm, torch.cat(reads, 2), x, turns) if turns is not None and reads else out

    def _attend_whole(
        self, q: Tensor, q_far: Tensor, k: Tensor, v: Tensor, until: Tensor, span: Span, scale: float
    ) -> Softmax:
        """Attention of a whole sequence; `until` [B, M, T]: the step at which each token loses its place."""
        gone = min(span.length, max(self.sinks, span.length - self.reach))  # sinks, and what leaves the window
        since = torch.arange(gone, device=k.device)
        since = torch.where(since < self.sinks, since, since + self.reach)
        turned = torch.cat([k[:, :, : self.sinks], self._turn_in(k[:, :, self.sinks : gone], span)], 2)
        far = Far(turned, v[:, :, :gone], since[None, None], until[..., :gone], max(0, gone - self.sinks))
        start = span.start_on(q.device)
        return attend_window(q, q_far, (k[:, :, :0],) * 2, (k, v), start, self.reach, scale, far, self.sinks)

    # Who loses.
    def _resolve(
        self, new: Arrivals, trail: Tensor, ranks: Tensor | None, state: Tensor | None
    ) -> tuple[Outcome | None, Tensor]:
        """The outcome for the tokens of a piece that push one out of the window, None if none does, and the scores of
        the last L tokens after the piece.

        Args:
            trail: these scores before it, [B, M, L]. ranks: of the store. state: at the last multiple of the grid.
        """
        span = new.span
        score = self._score(new.k, new.v, new.x, new.inputs, span, state)
        scores = torch.cat([trail, score.expand(*trail.shape[:2], span.length)], -1)
        received = self._received(new) if self.store.every else None
        first, outcome = self._first(span), None
        if ranks is not None and first < span.length:

            def take(at: Tensor) -> Tensor:
                found = gather(scores, at + first, 2)
                if received is None:
                    return found
                given, before = received
                return found + gather(given.flatten(2), before[:, first:] * given.shape[-1] + at + first, 2)

            pushed = self._pushed(span, new.k.device)
            priority = eviction.pool(take, pushed.back, self.span)
            outcome = eviction.contest(ranks, eviction.rank(priority, pushed.positions, pushed.real))
        if received is not None:
            scores = scores + received[0][:, :, -1]
        if not span.padded and len(set(span.counts)) == 1:
            return outcome, scores[:, :, span.counts[0] : span.counts[0] + self.scores_kept]
        last = torch.tensor(span.counts)[:, None] + torch.arange(self.scores_kept)
        return outcome, gather(scores, last, 2)

    def _first(self, span: Span) -> int:
        """The first token of `span` that pushes one out of the window of some row."""
        return max(0, self.sinks + self.reach - span.first)

    def _pushed(self, span: Span, device: torch.device) -> Pushed:
        return span.once(("pushed", device), lambda: self._make_pushed(span, device))

    def _make_pushed(self, span: Span, device: torch.device) -> Pushed:
        first = self._first(span) if span.length > 1 else 0
        positions = span.positions(device)[:, first:] - self.reach
        real = (positions >= self.sinks) & span.real(device)[:, first:]
        return Pushed(positions.clamp(min=0), real, (positions - self.sinks) % self.span)

    @torch.no_grad()
    def _score(
        self, k: Tensor, v: Tensor, x: Tensor, inputs: Tensor | None, span: Span, state: Tensor | None
    ) -> Tensor:
        """Scores of new tokens [B, M, T], or what broadcasts to it."""
        positions = span.positions(k.device)

        def error() -> Tensor:
            assert self.cell is not None and inputs is not None and state is not None
            mine = self._unturned(k, positions[:, None].expand(*k.shape[:3]))
            groups = self.cell.num_heads // k.shape[1]
            mine, values = (t.repeat_interleave(groups, 1) for t in (mine, v))
            return self.cell.error(mine, values, self.cell.gates(inputs), state).unflatten(1, (-1, groups)).mean(2)

        return self.store.score(x, positions, error).float().expand(*k.shape[:3])

    def _received(self, new: Arrivals) -> tuple[Tensor, Tensor]:
        """What the observed queries of a piece attend to, added up.

        Returns:
            [B, M, O + 1, L + T]: attention to the tokens of trail and piece from the first 0, 1, ... O observed ones;
            [R, T]: how many of these are before each query.
        """
        span, device, every = new.span, new.k.device, self.store.every
        first = -span.start % every
        index = first[:, None] + torch.arange(0, span.length, every)  # of the observed queries, [R, O]
        real = (index < torch.tensor(span.counts)[:, None]).to(device)
        before = (torch.arange(span.length) - first[:, None] + every - 1).div(every, rounding_mode="floor")
        at = index.clamp(max=span.length - 1)
        q, q_far = gather(new.q, at, 2), gather(new.q_far, at, 2)
        positions = (span.start[:, None] + index).to(device)[..., None]
        count = new.near.shape[2]
        keys = span.start_on(device)[:, None] + torch.arange(span.length - count, span.length, device=device)
        seen = [
            torch.arange(new.sinks.shape[2], device=device) <= positions,
            visible(positions, keys[:, None], self.sinks, self.reach),
        ]
        given = _weights([(q_far, new.sinks), (q, new.near)], torch.cat(seen, -1), new.scale)[..., -count:]
        given = given.where(real[:, None, :, None], 0).cumsum(2)  # a query behind the end may see nothing
        given = F.pad(given, (self.scores_kept + span.length - count, 0, 1, 0))
        return given, before.clamp(max=index.shape[1]).to(device)

    def _received_once(self, q: Tensor, span: Span, memory: StoringMemory, scale: float) -> Tensor:
        """What the tokens of the ring, slot by slot [B, M, W or fewer], get from the one query a row of `span`."""
        keys, _ = memory.kept
        far = self.sinks + memory.shift
        pairs = [(self._seen_by_sinks(q, span), keys[:, :, : self.sinks]), (q, keys[:, :, far:])]
        filled = torch.arange(keys.shape[2] - memory.shift, device=q.device) <= span.start_on(q.device)[:, None]
        return _weights(pairs, filled[:, None], scale)[:, :, 0, self.sinks :]

    # Where keys are seen from, and how the cell is given them.
    @property
    def _moves(self) -> Rotary | None:
        """The rotation, if stored keys are turned."""
        return self.rotary[0] if self.clips_sinks else None

    def _turn_in(self, k: Tensor, span: Span) -> Tensor:
        """Keys [B, M, E, H] that leave the window in `span`, as they are stored."""
        if (rotary := self._moves) is None or not k.shape[2]:
            return k
        positions = self._pushed(span, k.device).positions
        return rotary.turn_by(k, span.once(("stored", k.device), lambda: self.sinks - positions))

    def _turn_out(self, k: Tensor, ranks: Tensor) -> Tensor:
        """Stored keys [B, M, E, H] of tokens with these ranks [B, M, E], as the cell is given them."""
        if (rotary := self._moves) is None:
            return self._unturned(k, position_of(ranks))
        if self.turns_back:
            return rotary.turn_by(k, torch.full((1, 1), -self.sinks, device=k.device))
        return _turned(rotary, k, position_of(ranks) - self.sinks)

    def _unturned(self, k: Tensor, positions: Tensor) -> Tensor:
        """Keys as the attention has them, at positions [B, M, E], as the cell is given them."""
        (rotary,) = self.rotary
        return _turned(rotary, k, -positions) if self.turns_back and rotary is not None else k

    def _turn_of_leaving(self, rotary: Rotary, positions: Tensor) -> Turn | None:
        return None  # each head's tokens have positions of their own: `_turn_out`

    def _seen(self, span: Span, ranks: Tensor, outcome: Outcome) -> tuple[Tensor, Tensor]:
        """Since when and until when the queries of `span` see sinks, places and newcomers: [B, M, S + P + E] each."""

        def make(places: Tensor) -> Tensor:
            sinks = torch.arange(self.sinks, device=device) - span.start_on(device)[:, None]
            newcomers = torch.arange(first, span.length, device=device)
            shape = (*ranks.shape[:2], -1)
            return torch.cat([sinks[:, None].expand(shape), places, newcomers.expand(shape)], -1)

        device, first = ranks.device, span.length - outcome.losers.shape[-1]
        if self.steps_on_device(span):
            since = span.once(("since", device), lambda: make(torch.full_like(ranks, -1)))
        else:
            since = make(torch.where(ranks >= TOKEN, -1, span.length))
        return since, F.pad(eviction.until(outcome) + first, (self.sinks, 0), value=span.length)

    def _heads(self, inputs: Tensor) -> Tensor:
        """Gate inputs [B, T, G * N] by key/value head, as a view [B, M, T, G, N / M]."""
        assert self.cell is not None
        split = inputs.unflatten(-1, (self.cell.num_gates, self.store.kv_heads, -1))
        return split.permute(0, 3, 1, 2, 4)


def _part(x: Tensor | None, at: slice) -> Tensor | None:
    return None if x is None else x[:, at]


def _joined(held: Tensor) -> Tensor:
    """The opposite of `_heads`."""
    return held.permute(0, 2, 3, 1, 4).flatten(2)


def _weights(pairs: list[tuple[Tensor, Tensor]], seen: Tensor, scale: float) -> Tensor:
    """Softmax of queries [B, N, O, H], each over the keys [B, M, K, H] of all pairs that are `seen` [R, O, K]: the mean
    over the heads of a group, [B, M, O, K]."""
    scores = []
    for q, k in pairs:
        q = q.unflatten(1, (k.shape[1], -1))  # heads that share keys become more queries
        scores.append((q.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, q.shape[2:4]).float() * scale)
    masked = torch.cat(scores, -1).masked_fill(~seen[:, None, None], -torch.inf)
    return masked.softmax(-1).mean(2)


def _turned(rotary: Rotary, k: Tensor, delta: Tensor) -> Tensor:
    """Keys [B, M, E, H], each turned by its own `delta` [B, M, E]."""
    turned = rotary.turn_by(k.flatten(0, 1)[:, None], delta.flatten(0, 1))
    return turned[:, 0].unflatten(0, k.shape[:2])
