"""Words are decoded by compiled loops on the CPU: at small widths launching operations is what costs.

One word at batch 1 of a narrow model is a hundred products of a few thousand numbers, which take less
time than a library takes to start them. Here one compiled function runs a layer for *rows*, whatever
these are: the words of a prompt, one word of each sequence, or a draft that is verified. A row reads the
state that a slot holds and writes that of another, so going back is reading an older slot. What a row
gives does not depend on the rows beside it: a sum has one order, that of the width.

The loops trust the shapes and types that they are given: :mod:`earlyexit.exits.fused`, which has made
them, is the only caller. Their mathematics is that of :mod:`earlyexit.nn.block`, :mod:`~.mixing`,
:mod:`~.moe`, :mod:`~.heads` and :mod:`~.unembedding`, with R rows in place of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from earlyexit.nn.bk_loops import compiled

BLOCK = 128  # columns of a product at a time: their weights stay near while rows pass
STEP = 4  # inputs of a product at a time; a matrix has rows of zeros up to a multiple of it
CHUNK = 64  # rows of a prompt at a time
DEPTH, GATE, AGREEMENT = range(3)  # what decides whether a row leaves
RECOMPUTED, KEPT, POTENTIALS = range(3)  # what it leaves behind
FINE, BROKEN = range(2)  # how decoding ended; broken: a score or logit is not finite

# Columns of ``Weights.at``: where each matrix (input before output) or offset begins in each layer. K
# are the H + H·P potentials and values, F the hidden units of an expert, G those of a gate, S frequent
# words.
NAMES = (
    *("token", "position"),  # (V, D), (n_seq, D); the same for all layers
    *("norm", "given", "given_bias"),  # (2, D), (D, K), (K)
    *("eta", "t", "parts"),  # (H), (H), (2, H·P): of Re y and Im y
    *("gate", "out", "out_bias"),  # (D, H·P), (H·P, D), (D)
    *("router", "router_bias"),  # (D, E), (E)
    *("up", "up_bias", "down", "down_bias"),  # (E, D, F), (E, F), (E, F, D), (E, D)
    *("judge", "judge_bias", "verdict", "verdict_bias"),  # (D, G), (G), (G or D, 2), (2)
    *("translator", "translator_bias", "head_norm"),  # (D, D), (D), (2, D)
    *("words", "words_bias"),  # (D, S + clusters), (S + clusters)
    *("narrow_1", "rare_1", "narrow_2", "rare_2"),  # (D, D₁), (D₁, V₁), (D, D₂), (D₂, V₂)
    *("epsilon", "head_epsilon"),  # of the norms
)
(
    TOKEN, POSITION, NORM, GIVEN, GIVEN_BIAS, ETA, T, PARTS, GATE_PROJ, OUT, OUT_BIAS, ROUTER,
    ROUTER_BIAS, UP, UP_BIAS, DOWN, DOWN_BIAS, JUDGE, JUDGE_BIAS, VERDICT, VERDICT_BIAS, TRANSLATOR,
    TRANSLATOR_BIAS, HEAD_NORM, WORDS, WORDS_BIAS, NARROW_1, RARE_1, NARROW_2, RARE_2, EPSILON,
    HEAD_EPSILON,
) = range(len(NAMES))  # fmt: skip
NONE = -1  # there is no such matrix
# Sizes in ``Weights.size``.
SIZES = ("L", "D", "H", "C", "E", "F", "G", "S", "D1", "V1", "D2", "V2", "top_k", "left", "N", "V")
_L, _D, _H, _C, _E, _F, _G, _S, _D1, _V1, _D2, _V2, _TOP_K, _LEFT, _N, _V = range(len(SIZES))
# Fields of ``Rows.x``: states, normed states, what is handed on, what is read of the resolvent and its
# gate, what mixing adds, the experts' shares, their hidden units and output, a gate's, and a head's.
H, U, HANDED, Z, GATED, M, ROUTE, HIDDEN, EXPERT, JUDGED, SCORES, FEATURES, NARROW = range(13)
# Fields of ``Rows.of``: 0 … R − 1; the rows that run, first; whether one does; slots that it reads and
# writes; where it left.
INDEX, LIVE, RUNNING, BEFORE, SLOT, EXIT = range(6)


class Weights(NamedTuple):
    """All weights of a model stand one after another, so that compiled functions are handed little."""

    w: np.ndarray  # float32 or float64
    at: np.ndarray  # (L, NAMES): where each begins; NONE where there is none
    size: np.ndarray  # (SIZES,)


class Rule(NamedTuple):
    """What decides whether a row leaves: a policy, as the loops read it."""

    kind: int
    thresholds: np.ndarray  # (L,)
    decay: float


class Choice(NamedTuple):
    """How a word is chosen; a temperature of 0 takes the most probable."""

    temperature: float
    top_p: float


class Rows(NamedTuple):
    """The rows that are run, and room for what is made of them."""

    x: np.ndarray  # (fields, R, the widest)
    top: np.ndarray  # (R, S + clusters): logits of frequent words
    rare: np.ndarray  # (1, V₁ or V₂): logits of a cluster at one row
    logits: np.ndarray  # (V,): of one row
    p: np.ndarray  # (V,): the distribution that a word of it is drawn from
    of: np.ndarray  # (fields, R)


def rows(W: Weights, R: int) -> Rows:
    """Return room for ``R`` rows, which is used again for every word."""
    size = dict(zip(SIZES, W.size.tolist(), strict=True))
    K, clusters = size["H"] + size["C"], 2 * bool(size["V1"])
    widest = STEP + max(K, size["D"], size["E"], size["F"], size["G"])
    of = np.zeros((6, R), dtype=np.int64)
    of[INDEX] = np.arange(R)
    return Rows(
        np.zeros((13, R, widest), W.w.dtype),
        np.zeros((R, size["S"] + clusters), W.w.dtype),
        np.zeros((1, max(1, size["V1"], size["V2"])), W.w.dtype),
        np.zeros(size["V"]),
        np.zeros(size["V"]),
        of,
    )


@compiled
def _product(w, matrix, offset, D, M, which, count, x, out):
    """Write x W + b ``(M,)`` of ``count`` rows; a block of weights is read once for all of them."""
    for start in range(0, M, BLOCK):
        size = min(BLOCK, M - start)
        for i in range(count):
            row, to = x[which[i]], out[which[i], start : start + size]
            for m in range(size):
                to[m] = 0 if offset == NONE else w[offset + start + m]
            for d in range(0, D, STEP):
                at = matrix + d * M + start
                a, b, c, e = row[d], row[d + 1], row[d + 2], row[d + 3]
                wa, wb = w[at : at + size], w[at + M : at + M + size]
                wc, we = w[at + 2 * M : at + 2 * M + size], w[at + 3 * M : at + 3 * M + size]
                for m in range(size):
                    to[m] += a * wa[m] + b * wb[m] + c * wc[m] + e * we[m]


@compiled
def _padded(inputs):
    return (inputs + STEP - 1) // STEP * STEP


@compiled
def _norm(x, w, affine, epsilon, out):
    D, mean, square = len(x), 0.0, 0.0
    for d in range(D):
        mean += x[d]
    mean /= D
    for d in range(D):
        square += (x[d] - mean) * (x[d] - mean)
    scale = 1.0 / np.sqrt(square / D + epsilon)
    for d in range(D):
        out[d] = (x[d] - mean) * scale * w[affine + d] + w[affine + D + d]


@compiled
def _rectify(x):
    for i in range(len(x)):
        if x[i] < 0:  # NaN stays
            x[i] = 0


@compiled
def _resolve(handed, w, eta, t, heads, old, new):
    """Take one step of BK-Core, from the state ``old`` to ``new`` ``(2, H + H·P)``, Re and Im."""
    P = (new.shape[1] - heads) // heads
    for h in range(heads):
        th = float(w[t + h])
        re = handed[h] - 2.0 * th - th * th * old[0, h]
        im = -float(w[eta + h]) - th * th * old[1, h]
        scale = 1.0 / (re * re + im * im)
        new[0, h], new[1, h] = re * scale, -im * scale
    for h in range(heads):
        gr, gi, th = new[0, h], new[1, h], float(w[t + h])
        for c in range(heads + h * P, heads + h * P + P):
            re, im = handed[c] - th * old[0, c], -th * old[1, c]
            new[0, c], new[1, c] = gr * re - gi * im, gr * im + gi * re


@compiled
def _read(state, w, parts, heads, z):
    """Write the values of each head over their root mean square, ``(H·P,)``."""
    C = state.shape[1] - heads
    P = C // heads
    for h in range(heads):
        square = 0.0
        for c in range(h * P, h * P + P):
            z[c] = w[parts + c] * state[0, heads + c] + w[parts + C + c] * state[1, heads + c]
            square += z[c] * z[c]
        scale = 1.0 / np.sqrt(square / P + 1e-6)
        for c in range(h * P, h * P + P):
            z[c] *= scale


@compiled
def _experts(w, at, size, r, one, B):
    """Add the experts of a row, and the mixing, to its state; ``one`` holds the row's number."""
    D, E, F = size[_D], size[_E], size[_F]
    route, h, m = B.x[ROUTE, r, :E], B.x[H, r], B.x[M, r]
    largest, total = route.max(), 0.0
    for e in range(E):
        route[e] = np.exp(route[e] - largest)
        total += route[e]
    for d in range(D):
        h[d] += m[d]
    for _ in range(size[_TOP_K]):
        best = 0
        for e in range(E):
            if route[e] > route[best]:
                best = e
        share, route[best] = route[best] / total, -1.0
        for stage in range(2):
            matrix, offset = at[UP] + best * _padded(D) * F, at[UP_BIAS] + best * F
            d, n, x, out = D, F, B.x[U], B.x[HIDDEN]
            if stage == 1:
                matrix, offset = at[DOWN] + best * _padded(F) * D, at[DOWN_BIAS] + best * D
                d, n, x, out = F, D, B.x[HIDDEN], B.x[EXPERT]
            _product(w, matrix, offset, d, n, one, 1, x, out)
            if stage == 0:
                _rectify(B.x[HIDDEN, r, :F])
        for d in range(D):
            h[d] += share * B.x[EXPERT, r, d]


@compiled
def _layer(W, k, first, last, B, state):
    """Run layer ``k`` for the rows ``first`` … ``last`` − 1, of which some may only hand on.

    Rows of one sequence follow each other; state is ``(L, slots, 2, K)``.
    """
    w, at, size = W.w, W.at[k], W.size
    D, heads, C, n, left = size[_D], size[_H], size[_C], 0, size[_LEFT]
    live = B.of[LIVE]
    for r in range(first, last):
        _norm(B.x[H, r, :D], w, at[NORM], w[at[EPSILON]], B.x[U, r])
        if B.of[RUNNING, r]:
            live[n] = r
            n += 1
    for stage in range(4):  # one call of the product, which is compiled once then
        which, count, x = live[:n], n, B.x[U]
        if stage == 0:
            matrix, offset, d, m, out = at[GIVEN], at[GIVEN_BIAS], D, heads + C, B.x[HANDED]
            if left != KEPT:
                which, count = B.of[INDEX][first:last], last - first
        elif stage == 1:
            matrix, offset, d, m, out = at[GATE_PROJ], NONE, D, C, B.x[GATED]
        elif stage == 2:
            matrix, offset, d, m, out = at[OUT], at[OUT_BIAS], C, D, B.x[M]
            x = B.x[Z]
        else:
            matrix, offset, d, m, out = at[ROUTER], at[ROUTER_BIAS], D, size[_E], B.x[ROUTE]
        _product(w, matrix, offset, d, m, which, count, x, out)
        if stage == 0:
            for r in range(first, last):
                runs = B.of[RUNNING, r]
                if left == POTENTIALS and not runs:
                    B.x[HANDED, r, heads:] = 0
                new, old = state[k, B.of[SLOT, r]], state[k, B.of[BEFORE, r]]
                _resolve(B.x[HANDED, r], w, at[ETA], at[T], heads, old, new)
                if runs:
                    _read(new, w, at[PARTS], heads, B.x[Z, r])
        for i in range(n):
            r = live[i]
            if stage == 1:
                z, gated = B.x[Z, r], B.x[GATED, r]
                for c in range(C):
                    z[c] *= gated[c] / (1 + np.exp(-gated[c]))
            elif stage == 2:
                u, added = B.x[U, r], B.x[M, r]
                for c in range(D):
                    u[c] += added[c]
            elif stage == 3:
                _experts(w, at, size, r, live[i : i + 1], B)


@compiled
def _passes(W, rule, k, r, position, B):
    """Return 1 if a row leaves after layer ``k``, 0 if not, and −1 if its score is NaN."""
    threshold = rule.thresholds[k]
    if rule.kind == DEPTH:
        return int(k >= threshold)
    never = np.isinf(threshold) and (threshold < 0) == (rule.kind == GATE)
    if never or k == len(rule.thresholds) - 1:  # after the last layer there is no gate
        return 0
    w, at, D, G, one = W.w, W.at[k], W.size[_D], W.size[_G], B.of[INDEX][r : r + 1]
    _norm(B.x[H, r, :D], w, W.at[k + 1, NORM], w[at[EPSILON]], B.x[U, r])
    for stage in range(0 if G else 1, 2):
        matrix, offset, d, m, x, out = at[JUDGE], at[JUDGE_BIAS], D, G, B.x[U], B.x[JUDGED]
        if stage == 1:
            matrix, offset, m, out = at[VERDICT], at[VERDICT_BIAS], 2, B.x[SCORES]
            if G:
                d, x = G, B.x[JUDGED]
        _product(w, matrix, offset, d, m, one, 1, x, out)
        if stage == 0:
            _rectify(B.x[JUDGED, r, :G])
    log_kl, agree = B.x[SCORES, r, 0], B.x[SCORES, r, 1]
    if np.isnan(log_kl if rule.kind == GATE else agree):
        return -1
    if rule.kind == GATE:
        return int(np.exp(log_kl) <= threshold)
    if rule.decay > 0:
        threshold = 0.9 * threshold + 0.1 * np.exp(-rule.decay * position / W.size[_N])
    return int(1 / (1 + np.exp(-agree)) >= threshold)


@compiled
def _project(W, k, which, n, B):
    """Write the features of ``n`` rows at exit ``k``, and their logits of frequent words."""
    w, at, D = W.w, W.at[k], W.size[_D]
    translate = at[TRANSLATOR] != NONE
    for stage in range(0 if translate else 1, 2):
        matrix, offset, m, x, out = at[TRANSLATOR], at[TRANSLATOR_BIAS], D, B.x[H], B.x[FEATURES]
        if stage == 1:
            for i in range(n):
                f, h = B.x[FEATURES, which[i], :D], B.x[H, which[i]]
                for d in range(D):
                    f[d] = h[d] + f[d] if translate else h[d]
                _norm(f, w, at[HEAD_NORM], w[at[HEAD_EPSILON]], f)
            matrix, offset, m, x, out = (
                at[WORDS],
                at[WORDS_BIAS],
                B.top.shape[1],
                B.x[FEATURES],
                B.top,
            )
        _product(w, matrix, offset, D, m, which, n, x, out)


@compiled
def _open(W, k, r, cluster, B):
    """Return the logits of a cluster's words at one row."""
    at, size, one = W.at[k], W.size, B.of[INDEX][:1]
    width, words = (size[_D1], size[_V1]) if cluster == 0 else (size[_D2], size[_V2])
    for stage in range(2):
        matrix = at[NARROW_1] if cluster == 0 else at[NARROW_2]
        d, m, x, out = size[_D], width, B.x[FEATURES][r : r + 1], B.x[NARROW]
        if stage == 1:
            matrix = at[RARE_1] if cluster == 0 else at[RARE_2]
            d, m, x, out = width, words, B.x[NARROW], B.rare
        _product(W.w, matrix, NONE, d, m, one, 1, x, out)
    return B.rare[0, :words]


@compiled
def _log_sum(x):
    largest, total = x.max(), 0.0
    for i in range(len(x)):
        total += np.exp(x[i] - largest)
    return largest + np.log(total)


@compiled
def _most_probable(W, k, r, B):
    """Return the most probable word of a projected row; −1 if its logit is not finite.

    A cluster is opened only where all of it outweighs the best word so far. Its best word wins if
    Σ exp(x − max x) stays below exp(cluster − best); where it does not, that shows after few words.
    """
    top, S = B.top[r], W.size[_S]
    word, best, start = top[:S].argmax(), top[:S].max(), S
    if not np.isfinite(top.sum()):
        return -1
    for c in range(len(top) - S):
        if top[S + c] > best:
            rare = _open(W, k, r, c, B)
            inside = rare.argmax()
            largest, total, limit = rare[inside], 0.0, np.exp(top[S + c] - best)
            if not np.isfinite(largest):
                return -1
            for x in rare:
                total += np.exp(x - largest)
                if total >= limit:
                    break
            if total < limit:
                word, best = start + inside, top[S + c] - np.log(total)
        start += W.size[_V1]
    return word


@compiled
def _all_logits(W, k, r, B):
    """Write the logits of all words of a projected row, up to a constant."""
    S = start = W.size[_S]
    B.logits[:S] = B.top[r, :S]
    for c in range(B.top.shape[1] - S):
        rare = _open(W, k, r, c, B)
        inside = B.top[r, S + c] - _log_sum(rare)
        for w in range(len(rare)):
            B.logits[start + w] = rare[w] + inside
        start += len(rare)


@compiled
def distribution(logits, temperature, top_p, out):
    """Write the probabilities ``(V,)`` that words are drawn with, temperature > 0.

    With top_p below 1 only the fewest words are left whose share reaches it (Holtzman et al. 2020).

    Returns:
        Whether all is finite.
    """
    largest, total = logits.max(), 0.0
    for w in range(len(logits)):
        out[w] = np.exp((logits[w] - largest) / temperature)
        total += out[w]
    if not (np.isfinite(largest) and np.isfinite(total)):
        return False
    out /= total
    if top_p < 1:  # halve the interval of the least probability that is kept, until it is found
        low, high = 0.0, 1.0
        for _ in range(64):
            level, share = (low + high) / 2, 0.0
            for w in range(len(out)):
                if out[w] >= level:
                    share += out[w]
            if share >= top_p:
                low = level
            else:
                high = level
        for w in range(len(out)):
            if out[w] < low:
                out[w] = 0.0
        out /= out.sum()
    return True


@compiled
def draw(p, uniform):
    """Return the word at which the sum of probabilities, or of weights, passes ``uniform``."""
    level, total, word = uniform * p.sum(), 0.0, 0
    for w in range(len(p)):
        if p[w] > 0:
            total, word = total + p[w], w
            if total > level:
                break
    return word


@compiled
def _choose(W, k, r, choice, uniform, B):
    """Return the word of a projected row, or −1; a drawn one leaves its distribution in ``B.p``."""
    if choice.temperature == 0:
        return _most_probable(W, k, r, B)
    _all_logits(W, k, r, B)
    fine = distribution(B.logits, choice.temperature, choice.top_p, B.p)
    return draw(B.p, uniform) if fine else -1


@compiled
def _embed(W, r, word, position, before, slot, B):
    D, token, place = W.size[_D], W.at[0, TOKEN], W.at[0, POSITION]
    for d in range(D):
        B.x[H, r, d] = W.w[token + word * D + d] + W.w[place + position * D + d]
    B.of[RUNNING, r], B.of[EXIT, r] = 1, W.size[_L]
    B.of[BEFORE, r], B.of[SLOT, r] = before, slot


@compiled
def _descend(W, rule, ran, n, position, draft, may, B, state, seen):
    """Run ``n`` rows down the layers, from the row ``ran[k]`` on at layer k, and let them leave.

    Args:
        position: of each row.
        draft: whether only the last row is judged, if it ``may`` leave, which ends the descent.

    Returns:
        The layer at which it ended; −1 if a score is NaN.
    """
    last = len(W.at) - 1
    for k in range(last + 1):
        _layer(W, k, ran[k], n, B, state)
        first = 0
        if draft:
            seen[3, k, n - ran[k] - 1] += n - ran[k]
            ran[k], first = n, n - 1 if may else n
        for r in range(first, n):
            if B.of[RUNNING, r]:
                passed = _passes(W, rule, k, r, position[r], B)
                if passed < 0:
                    return -1
                if passed and draft:
                    return k
                if passed:
                    B.of[RUNNING, r], B.of[EXIT, r] = 0, k
    return last


@compiled
def prompt(W, rule, ids, length, exits, state, ring, B):
    """Run all but the last known word of each sequence, in one pass; return how it ended.

    Args:
        ids, exits: ``(B, M)``; length: known words ``(B,)``; ring: slots of each sequence; B: room for
            the rows of one part of a prompt.
    """
    chunk, ran = B.x.shape[1], np.zeros(len(W.at), dtype=np.int64)
    position, seen = np.zeros(chunk, dtype=np.int64), np.zeros((1, 1, 1), dtype=np.int64)
    for b in range(len(ids)):
        for start in range(0, length[b] - 1, chunk):
            n = min(chunk, length[b] - 1 - start)
            for r in range(n):
                at = position[r] = start + r
                _embed(W, r, ids[b, at], at, b * ring + (at - 1) % ring, b * ring + at % ring, B)
            if _descend(W, rule, ran, n, position, False, False, B, state, seen) < 0:
                return BROKEN
            exits[b, start : start + n] = B.of[EXIT, :n]
    return FINE


@compiled
def decode(W, rule, choice, ids, length, end, exits, state, uniforms, stop, steps, read, B):
    """Continue all sequences by at most ``steps`` words each, side by side; return how it ended.

    Args:
        ids: words ``(B, M)``; length, end: how many are known and wanted ``(B,)``, changed in place.
        uniforms: numbers of [0, 1) ``(M, B)``; stop: words at which a sequence ends.
        read: whether words are chosen; else those that stand in ``ids`` are run, to time the layers.
    """
    last, ran = len(W.at) - 1, np.zeros(len(W.at), dtype=np.int64)
    sequence, position = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=np.int64)
    chosen = np.zeros(len(ids), dtype=np.int64)
    seen = np.zeros((1, 1, 1), dtype=np.int64)
    for _ in range(steps):
        n = 0
        for b in range(len(ids)):
            if length[b] < end[b]:
                sequence[n], position[n] = b, length[b] - 1
                _embed(W, n, ids[b, length[b] - 1], length[b] - 1, b, b, B)
                n += 1
        if n == 0:
            break
        if _descend(W, rule, ran, n, position, False, False, B, state, seen) < 0:
            return BROKEN
        for k in range(last + 1 if read else 0):
            count = 0
            for r in range(n):
                if min(B.of[EXIT, r], last) == k:
                    chosen[count] = r
                    count += 1
            if count:
                _project(W, k, chosen, count, B)
        for r in range(n):
            b, at = sequence[r], position[r]
            exits[b, at] = B.of[EXIT, r]
            length[b] += 1
            if read:
                word = _choose(W, min(B.of[EXIT, r], last), r, choice, uniforms[at, b], B)
                if word < 0:
                    return BROKEN
                ids[b, at + 1] = word
                if (stop == word).any():
                    end[b] = length[b]
    return FINE


@compiled
def speculate(
    W, rule, choice, ids, known, end, exits, state, uniforms, stop, words, seen, q, B
):  # fmt: skip
    """Continue one sequence losslessly by ``words`` words or a few more; return its length, or −1.

    While the rule lets words go, they are drafted, each by the head of its exit. A word that it does not
    let go ends the draft: for it the whole draft runs the layers that it lacks, in one pass, and the
    last head says which words stand. A draft that leaves deeper than the one before it first brings that
    one to the same layer, where it would have to come in any case.

    A drawn draft is kept with probability min(1, p/q), and else drawn again from (p − q)₊; so the words
    are distributed as the last layer's (Leviathan et al. 2023, Chen et al. 2023).

    Args:
        ids, exits: ``(M,)``. An exit is where a word that stood was drafted; L where none was.
        state: ``(L, slots, 2, K)``, a ring of more slots than a draft has words.
        uniforms: of a sequence, ``(M, 3, max_draft + 1)``.
        seen: counts ``(4, L, max_draft + 1)`` by exit and place in the draft of words that were
            drafted, decided upon, and that stood; and of rows that a layer ran, by how many at once.
        q: room for the distributions that drafts are drawn from, ``(max_draft, V)``; B: for rows.
    """
    last, ring, start = len(W.at) - 1, state.shape[1], known
    max_draft, draws = B.x.shape[1] - 1, choice.temperature > 0
    ran, by = np.zeros(last + 1, dtype=np.int64), np.zeros(max_draft + 1, dtype=np.int64)
    position = np.zeros(max_draft + 1, dtype=np.int64)
    while known < end and known - start < words:
        base, n, row, drafting, exit_layer = known - 1, 0, 0, True, last
        ran[:] = 0
        while row < n or drafting:  # first rows are drafted, then all of them verified
            if drafting:
                at = position[n] = base + n
                _embed(W, n, ids[at], at, (at - 1) % ring, at % ring, B)
                n += 1
                may = n <= max_draft and at + 2 < end
                exit_layer = _descend(W, rule, ran, n, position, True, may, B, state, seen)
                if exit_layer < 0:
                    return -1
                drafting = exit_layer < last
            k = exit_layer if drafting else last
            if drafting:
                _project(W, k, B.of[INDEX][n - 1 : n], 1, B)
            elif row == 0:
                _project(W, k, B.of[INDEX][:n], n, B)
            r = n - 1 if drafting else row
            word = _choose(W, k, r, choice, uniforms[base, 2 if drafting else 1, r], B)
            if word < 0:
                return -1
            if drafting:
                ids[base + n], by[r] = word, k
                seen[0, k, r] += 1
                if draws:
                    q[r] = B.p
                continue
            drafted, stood = row < n - 1, False
            if drafted:
                stood = word == ids[known]
                if draws:
                    guess = ids[known]
                    stood = uniforms[base, 0, r] * q[r, guess] < B.p[guess]
                    for w in range(len(B.p)):
                        B.p[w] = max(B.p[w] - q[r, w], 0.0)
                    word = guess if stood else draw(B.p, uniforms[base, 1, r])
                seen[1, by[r], r] += 1
                seen[2, by[r], r] += stood
            ids[known], exits[known - 1] = word, by[r] if stood else last + 1
            known, row = known + 1, row + 1
            if (stop == word).any():
                end = known
            if not stood or known >= end:
                break
    return known


@compiled
def price(W, layers, head, joined, repeats, words, state, B):
    """Run the first ``layers`` layers and, if asked, the head after them, ``joined`` rows at a time.

    Args:
        words: what the rows read, one after another, as often as it takes.
    """
    slots = state.shape[1]
    for i in range(repeats):
        for r in range(joined):
            n = i * joined + r
            _embed(W, r, words[n % len(words)], n % W.size[_N], n % slots, (n + 1) % slots, B)
        for k in range(layers):
            _layer(W, k, 0, joined, B, state)
        if head:
            _project(W, layers - 1, B.of[INDEX][:joined], joined, B)
            for r in range(joined):
                _most_probable(W, layers - 1, r, B)
