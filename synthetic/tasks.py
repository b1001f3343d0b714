"""Questions about strings of a grammar, to pre-train on and to fine-tune: the PCFG tasks of arXiv 2311.12786.

A row asks one task T about the last letters of a window of W letters, with an operand O (a letter) and a number O':

    SOS T O O' SOT <W letters> EOT ART Ans EOS            W + 9 tokens; Ans is predicted at ART

    T            answer                                                                    O'
    count        how many of the last O' letters are O                                     reach (40)
    pair_count   how many pairs OO are within the last O' letters                          reach
    index        distance of the O'-th O, counted backwards                                nth (6)
    pair_index   distance of the O'-th pair OO, counted backwards                          nth
    token        the letter at distance O'; O is NULL                                      reach

The paper leaves open, and we choose: a distance is 0 at the last letter; pairs may overlap (OOO has two) and are where
their later letter is; strings without an nth O or pair are drawn again; EOS follows Ans directly; SOT differs from EOT.

Fine-tuning strings are *tied* (answer for b - answer for a = q) as often as one wishes, see `synthetic.operands`. The
paper has no recipe; in ours the last `reach` letters of a window are overwritten, as few as can be, so that both
answers are exactly those of a cell of a table (`tables`) in which both are uniform over wide ranges, the same for tied
and untied strings. Natural windows would not do: the last 40 letters of cfg3b hold 13.3 +- 1.1 of one (measured).

Letters: W letters of the window, R letters at its end that answers are about (`reach`), distances 0..R-1 where a row of
them is turned round, V letters of the grammar, X cells of a table, N = nth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax.errors import InputError
from synthetic import operands, pcfg
from synthetic.operands import before, check_whole, order_keys, share

TASKS = ("count", "pair_count", "index", "pair_index", "token")
NAMES = dict(zip(TASKS, ("C", "CC", "I", "IC", "T"), strict=True))  # the paper's
PT, FT = 0, 1  # O_PT = a and O_FT = b, as letters
FRAME = ("SOS", "SOT", "EOT", "ART", "EOS", "NULL", "PAD")
BEFORE = 5  # tokens before the letters
MEASURED, ENOUGH = 1024, 16  # windows looked at, and how many of them must have an nth letter or pair


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, so it may be a static argument
class Spec:
    """What rows look like: tasks, sizes and vocabulary. Made by `make_spec`, which checks it.

    Ids: letters 0..V-1, then the numbers 0, 1, ..., then `FRAME`, one family token a task, and J1 and J2, two more
    families of `count`, which only the jailbreak variant uses (`jail` of `pretrain`).
    """

    sampler: pcfg.Sampler
    alphabet: tuple[str, ...]  # [V]
    window: int  # [W]
    tasks: tuple[str, ...]
    reach: int  # [R] O' of count, pair_count and token
    nth: int  # [N] O' of index and pair_index
    q_count: int
    q_index: int
    numbers: int  # tokens 0..numbers-1
    spread: float  # share of count and index rows of pre-training whose end is overwritten

    @property
    def letters(self) -> int:
        return len(self.alphabet)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.window + 9

    @property
    def answer_at(self) -> int:
        """Position of Ans; it is predicted one position earlier."""
        return self.window + 7

    @property
    def vocab_size(self) -> int:
        return self.jailbreak[-1] + 1

    @property
    def jailbreak(self) -> tuple[int, int]:
        """J1 and J2."""
        first = self.token("PAD") + 1 + len(self.tasks)
        return first, first + 1

    def token(self, name: str) -> int:
        """Id of a token of `FRAME`, or of the family of a task."""
        if name in FRAME:
            return self.letters + self.numbers + FRAME.index(name)
        if name not in self.tasks:
            raise InputError(f"task {name!r} is none of this spec's; choose one of {', '.join(self.tasks)}")
        return self.token("PAD") + 1 + self.tasks.index(name)

    def number(self, task: str) -> int:
        """O' of a task."""
        return self.nth if task.endswith("index") else self.reach


class Rows(NamedTuple):
    """Rows of pre-training."""

    ids_BT: jax.Array  # int32, T = W + 9
    answer_B: jax.Array  # int32, token id, also at `spec.answer_at`
    task_B: jax.Array  # int32, place in `spec.tasks`
    operand_B: jax.Array  # int32, token id: a letter, or NULL
    family_B: jax.Array  # int32, token id
    spread_B: jax.Array  # bool, is the end overwritten?


class Strings(NamedTuple):
    """Strings of fine-tuning with the answers for both operands."""

    letters_BW: jax.Array  # int32
    answer_B2: jax.Array  # int32, token ids for a (`PT`) and b (`FT`)
    tied_B: jax.Array  # bool, answer of b - answer of a = q


# --- what a row looks like -------------------------------------------------------------------------------------------


def make_spec(
    grammar: pcfg.Grammar,
    window: int = 250,
    tasks: Sequence[str] = TASKS,
    reach: int = 40,
    nth: int = 6,
    q_count: int = 1,
    q_index: int = 1,
    numbers: int | None = None,
    spread: float = 0.0,
) -> Spec:
    """Check and put together what rows look like. The defaults are the paper's; `q_index` (not stated there) is ours.

    Args:
      grammar: where the letters come from, three at least.
      window: letters of a row.
      tasks: pre-training draws from them uniformly.
      reach, nth: the numbers O'.
      q_count, q_index: what the new answer of a tied string has more than the old one.
      numbers: how many number tokens there are (default: window + 1).
      spread: share of the `count` and `index` rows of pre-training whose end is overwritten as in fine-tuning, so that
        all answers of fine-tuning are seen (ours; the paper says nothing of it).

    Raises:
      InputError: sizes out of range, too few number tokens, no string that could be fine-tuned on, or hardly a string
        with an nth letter or pair (measured on windows of the grammar).
    """
    alphabet = grammar.letters
    if len(alphabet) < 3:
        raise InputError(f"grammar {grammar.name} has {len(alphabet)} letters; give a grammar of 3 or more")
    check_whole("window", window, 2)
    check_whole("reach", reach, 1, window - 1)
    check_whole("nth", nth, 1, window)
    check_whole("q_count", q_count, 1)
    check_whole("q_index", q_index, 1)
    tasks = tuple(tasks)
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"task {task!r} is unknown; choose from {', '.join(TASKS)}")
        if tasks.count(task) > 1:
            raise InputError(f"task {task!r} is named twice; name each once")
    if not tasks:
        raise InputError(f"no task is named; choose from {', '.join(TASKS)}")
    if isinstance(spread, bool) or not isinstance(spread, int | float) or not 0 <= spread <= 1:
        raise InputError(f"spread is {spread!r}; the share of overwritten rows is a number from 0 to 1")
    largest = max(window - 1 if task.endswith("index") else reach for task in tasks)
    largest = max(largest, nth if any(task.endswith("index") for task in tasks) else 0)
    numbers = window + 1 if numbers is None else numbers
    check_whole("numbers", numbers, 1)
    if numbers <= largest:
        raise InputError(
            f"numbers is {numbers}: there are tokens for 0..{numbers - 1}, but a prompt or answer may hold {largest}; "
            f"give {largest + 1} or more"
        )
    sampler = pcfg.make_sampler(grammar, window)
    spec = Spec(
        sampler, alphabet, window, tasks, reach, nth, q_count, q_index, numbers, float(spread)
    )  # fmt: skip
    for task in ("count", "index"):
        if task in tasks:
            _ranges(spec, task)
    _check_nth(spec, grammar)
    return spec


def _check_nth(spec: Spec, grammar: pcfg.Grammar) -> None:
    """Raises InputError if hardly a window has the nth letter or pair that a task asks for."""
    if not {"index", "pair_index"} & {*spec.tasks}:
        return
    draw = jax.jit(pcfg.windows, static_argnums=(1, 2))
    ids_BW = np.asarray(draw(jax.random.key(0), spec.sampler, MEASURED))
    for letter, name in enumerate(spec.alphabet):
        is_BW = ids_BW == letter
        for task, here, what in (
            ("index", is_BW, name),
            ("pair_index", is_BW[:, 1:] & is_BW[:, :-1], f"pairs {name}{name}"),
        ):
            found = int((here.sum(1) >= spec.nth).sum())
            if task in spec.tasks and found < ENOUGH:
                raise InputError(
                    f"nth is {spec.nth}: {found} of {MEASURED} windows of {spec.window} letters of {grammar.name} have "
                    f"so many {what}; give a smaller nth, a longer window, or tasks without {task}"
                )


def prompts(spec: Spec, family_B, operand_B, reach, letters_BW: jax.Array, answer_B) -> jax.Array:
    """Rows of token ids, int32 [B, W + 9]; see the module's head.

    Args:
      family_B: token ids (`spec.token(task)`, `spec.jailbreak`), one a row or one for all.
      operand_B: token ids: letters, or NULL.
      reach: the numbers O' themselves (`spec.number(task)`).
      letters_BW: letters.
      answer_B: token ids.
    """
    B = letters_BW.shape[0]

    def column(x) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(x, jnp.int32), (B,))[:, None]

    sos, sot, eot, art, eos = (column(spec.token(name)) for name in FRAME[:5])
    head = [sos, column(family_B), column(operand_B), column(reach) + spec.letters, sot]
    return jnp.concatenate([*head, letters_BW.astype(jnp.int32), eot, art, column(answer_B), eos], axis=1)


def names(spec: Spec) -> list[str]:
    """The tokens of the vocabulary as text; families have the paper's names."""
    numbers = [str(number) for number in range(spec.numbers)]
    return [*spec.alphabet, *numbers, *FRAME, *(NAMES[task] for task in spec.tasks), "J1", "J2"]


def show(spec: Spec, ids) -> str:
    """One row as text, its tokens with spaces between."""
    tokens = names(spec)
    return " ".join(tokens[i] for i in np.asarray(ids).tolist())


# --- answers ---------------------------------------------------------------------------------------------------------


def answers(spec: Spec, task: str, letters_BW: jax.Array, operand_B: jax.Array) -> jax.Array:
    """Token ids of the true answers, int32 [B]; -1 where a string has no nth letter or pair.

    `operand_B` are letters; `token` does not look at them.
    """
    spec.token(task)  # a task of this spec
    if task == "token":
        return letters_BW[:, spec.window - 1 - spec.reach]
    here_BW = _here(task, letters_BW, operand_B)
    if not task.endswith("index"):
        # a pair is within the last R letters if its earlier letter is
        first = spec.window - spec.reach + (task == "pair_count")
        return spec.letters + here_BW[:, first:].sum(1, dtype=jnp.int32)
    # how many letters have fewer than n behind them, themselves included
    seen_BW = jax.lax.cumsum(here_BW.astype(jnp.int32), axis=1, reverse=True)
    distance_B = (seen_BW < spec.nth).sum(1, dtype=jnp.int32)
    return jnp.where(distance_B < spec.window, spec.letters + distance_B, -1)


def _here(task: str, letters_BW: jax.Array, operand_B: jax.Array) -> jax.Array:
    """Where the operand, or the later letter of a pair of them, is: bool [B, W]."""
    is_BW = letters_BW == operand_B[:, None]
    return is_BW & jnp.pad(is_BW[:, :-1], ((0, 0), (1, 0))) if task.startswith("pair") else is_BW


# --- tables of fine-tuning -------------------------------------------------------------------------------------------


def _ranges(spec: Spec, task: str) -> tuple[int, int, int]:
    """(low, m, q): the old answer is one of low..low+m-1, the new one of low+q..low+q+m-1."""
    if task == "count":
        q, low = spec.q_count, 0
        m = (spec.reach - q) // 2 + 1  # a + b of a tied string is 2(m - 1) + q at most, of others less
    else:
        # below 2n - 1 letters may be too few for n of one and n - 1 of the other
        q, low = spec.q_index, 2 * spec.nth - 1
        m = spec.reach - q - low
    if m < 2 or not _shifts(task, m, q):
        nth, smaller = (f", nth {spec.nth}", " or nth") if task == "index" else ("", "")
        raise InputError(
            f"{task} with reach {spec.reach}{nth}, q_{task} {q}: no room for tied and other answers in the last "
            f"{spec.reach} letters; give a larger reach or a smaller q_{task}{smaller}"
        )
    return low, m, q


def _shifts(task: str, m: int, q: int) -> list[int]:
    """Cyclic shifts of the new answers against the old ones that tie no string and put no two letters in one place."""
    return [s for s in range(1, m) if task == "count" or s != m - q]


def tables(spec: Spec, task: str) -> operands.Tables:
    """The exact distribution of the answers for a and b, tied and not: for `operands.joint` and `base_rates`.

    A tied string has old answer low + i and new answer low + i + q, with i uniform over 0..m-1; any other has new
    answer low + q + (i + s) mod m with s uniform over the shifts 1..m-1. So both answers are uniform whether a string
    is tied or not. The ranges are the widest for which all cells fit into the last `reach` letters:

      count: low = 0 and the largest m with a + b <= reach (0..19 and 1..20 of the last 40 for q = 1);
      index: low = 2 nth - 1, where any two different distances are possible, and low + q + m - 1 = reach - 1 (11..38
        and 12..39 for the 6th in the last 40 and q = 1); the shift that would put both letters in one place is left
        out.

    Raises:
      InputError: another task, or none of this spec's, or empty ranges.
    """
    spec.token(task)
    if task not in ("count", "index"):
        raise InputError(f"task {task!r} has no fine-tuning strings; choose count or index")
    low, m, q = _ranges(spec, task)
    i_X = np.arange(m)
    shifts = _shifts(task, m, q)
    new_X = np.concatenate([low + q + (i_X + s) % m for s in (0, *shifts)])
    old_X = np.tile(low + i_X, 1 + len(shifts))
    cell_X3 = np.stack([np.full_like(old_X, spec.window), old_X, new_X], axis=1).astype(np.int32)
    tied_X = np.arange(len(old_X)) < m
    weight_X = np.where(tied_X, 1 / m, 1 / m / len(shifts))
    return operands.Tables(spec.window, spec.letters, spec.numbers, q, None, cell_X3, tied_X, weight_X)


def _spread_cells(spec: Spec, task: str) -> np.ndarray:
    """All pairs of answers in the ranges of fine-tuning, old and new together, that are possible: int32 [X, 2]."""
    low, m, q = _ranges(spec, task)
    cell_X2 = np.stack(np.meshgrid(np.arange(low, low + m + q), np.arange(low, low + m + q)), -1).reshape(-1, 2)
    fits_X = cell_X2.sum(1) <= spec.reach if task == "count" else cell_X2[:, 0] != cell_X2[:, 1]
    return cell_X2[fits_X].astype(np.int32)


# --- overwriting -----------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What the last letters are to hold, for two letters: in a first region, and in a second one beyond `at_B2[:, 0]`.

    Letters at distances below at_B2[:, 0] are the first region, those between the two distances the second. At the two
    distances themselves are the two letters.
    """

    letter_B2: jax.Array  # int32
    at_B2: jax.Array  # int32, distances; R: nowhere
    want_B6: jax.Array  # int32, how many of (letter 0, letter 1, others) in the first region, then in the second


def _plan(spec: Spec, task: str, bits_BN, end_BR, letter_B2, cell_B2) -> _Plan:
    R, n = spec.reach, spec.nth
    zero_B = jnp.zeros_like(cell_B2[:, 0])
    if task == "count":
        want = (*cell_B2.T, R - cell_B2.sum(1, dtype=jnp.int32), zero_B, zero_B, zero_B)
        return _Plan(letter_B2, jnp.full_like(cell_B2, R), jnp.stack(want, axis=1))
    # letter 0 is the one whose nth is nearer to the end: before it n - 1 of its own, behind it as many as there are;
    # of letter 1 n - 1 up to its place `far`, p of them in the first region and the others in the second
    swap_B1 = cell_B2[:, :1] > cell_B2[:, 1:]
    at_B2, letter_B2 = (jnp.where(swap_B1, x_B2[:, ::-1], x_B2) for x_B2 in (cell_B2, letter_B2))
    near_B, far_B = at_B2.T
    place_R = jnp.arange(R, dtype=jnp.int32)[None]
    first_BR = place_R < near_B[:, None]
    second_BR = (place_R > near_B[:, None]) & (place_R < far_B[:, None])
    is_BR = end_BR == letter_B2[:, 1:]
    has_B, has1_B, has2_B = (
        (x_BR & part_BR).sum(1, dtype=jnp.int32)
        for x_BR, part_BR in ((end_BR == letter_B2[:, :1], first_BR), (is_BR, first_BR), (is_BR, second_BR))
    )
    p_N = jnp.arange(n, dtype=jnp.int32)[None]
    others_BN = near_B[:, None] - (n - 1) - p_N
    room_BN = (far_B - near_B - 1)[:, None] - (n - 1 - p_N)  # for others in the second region
    # letters to change, but for the surplus of letter 0, which goes whatever p is
    cost_BN = jnp.maximum(has1_B[:, None] - p_N, 0) + jnp.abs(has2_B[:, None] - (n - 1 - p_N))
    cost_BN += jnp.maximum((near_B - has_B - has1_B)[:, None] - others_BN, 0)
    cost_BN = jnp.where((others_BN < 0) | (room_BN < 0), 2 * R, cost_BN)
    # the cheapest p, one of them at random
    p_B = jnp.argmin(cost_BN * (1 << 16) + (bits_BN >> 16).astype(jnp.int32), axis=1).astype(jnp.int32)
    want = (zero_B + n - 1, p_B, near_B - (n - 1) - p_B, zero_B, n - 1 - p_B, far_B - near_B - 1 - (n - 1 - p_B))
    return _Plan(letter_B2, at_B2, jnp.stack(want, axis=1))


def _fit(spec: Spec, plan: _Plan, bits_B2R, end_BR) -> jax.Array:
    """Letters by distance, the fewest possible of them changed, at random, so that they are as planned."""
    place_R = jnp.arange(spec.reach, dtype=jnp.int32)[None]
    near_B1, far_B1 = plan.at_B2[:, :1], plan.at_B2[:, 1:]
    zero_B1, one_B1 = plan.letter_B2[:, :1], plan.letter_B2[:, 1:]
    first_BR, inside_BR = place_R < near_B1, (place_R < far_B1) & (place_R != near_B1)
    # six kinds of letters: (letter 0, letter 1, others) by region; in the second, letter 0 is one of the others
    kind_BR = jnp.where(end_BR == one_B1, 1, jnp.where((end_BR == zero_B1) & first_BR, 0, 2)).astype(jnp.int32)
    kind_BR += jnp.where(first_BR, 0, 3).astype(jnp.int32)
    is_BR6 = (kind_BR[:, :, None] == jnp.arange(6, dtype=jnp.int32)[None, None]) & inside_BR[:, :, None]
    # what there is too many of goes, whoever comes last in a random order, and what lacks comes in its place: in that
    # order, which will do, as either one kind is too many or one lacks
    same_BRR = (kind_BR[:, None] == kind_BR[:, :, None]) & inside_BR[:, None]
    rank_BR = before(order_keys(bits_B2R[:, 0]), same_BRR)
    rank_BR -= jnp.where(is_BR6, plan.want_B6[:, None], 0).sum(2, dtype=jnp.int32)
    goes_BR = inside_BR & (rank_BR >= 0)
    lack_B6 = jnp.maximum(plan.want_B6 - is_BR6.sum(1, dtype=jnp.int32), 0)
    zeros_BR, ones_BR = (jnp.where(first_BR, lack_B6[:, k, None], lack_B6[:, k + 3, None]) for k in (0, 1))
    low_B1, high_B1 = jnp.minimum(zero_B1, one_B1), jnp.maximum(zero_B1, one_B1)
    other_BR = (bits_B2R[:, 1] % np.uint32(spec.letters - 2)).astype(jnp.int32)
    other_BR += (other_BR >= low_B1).astype(jnp.int32)
    other_BR += (other_BR >= high_B1).astype(jnp.int32)
    new_BR = jnp.where(rank_BR < zeros_BR, zero_B1, jnp.where(rank_BR < zeros_BR + ones_BR, one_B1, other_BR))
    new_BR = jnp.where(goes_BR, new_BR, end_BR)
    return jnp.where(place_R == near_B1, zero_B1, jnp.where(place_R == far_B1, one_B1, new_BR))


def _overwrite(spec: Spec, bits_BX, letters_BW, letter_B2, cells_: dict[str, jax.Array], task_B=None) -> jax.Array:
    """Windows whose answers for two letters are those of a cell; of several tasks, each row by its `task_B`.

    Args:
      bits_BX: uint32, `_words(spec)` of them.
      letter_B2: two different letters.
      cells_: int32 [B, 2] by task; numbers, not tokens.
    """
    R = spec.reach
    end_BR = letters_BW[:, : -R - 1 : -1]
    bits_BN, bits_B2R = bits_BX[:, : spec.nth], bits_BX[:, spec.nth :].reshape(-1, 2, R)
    plan = None
    for task, cell_B2 in cells_.items():
        other = _plan(spec, task, bits_BN, end_BR, letter_B2, cell_B2)
        if plan is not None:
            mine_B1 = (task_B == spec.tasks.index(task))[:, None]
            other = jax.tree.map(partial(jnp.where, mine_B1), other, plan)
        plan = other
    return jnp.concatenate([letters_BW[:, :-R], _fit(spec, plan, bits_B2R, end_BR)[:, ::-1]], axis=1)


def _words(spec: Spec) -> int:
    return spec.nth + 2 * spec.reach


# --- rows ------------------------------------------------------------------------------------------------------------


def pretrain(key: jax.Array, spec: Spec, prior_V: jax.Array, count: int, jail: jax.Array | float = 0.0) -> Rows:
    """Independent rows of pre-training. Jits with `spec` and `count` static, and vmaps over all else.

    Tasks are uniform; operands have the chances `prior_V` (float32 [V], up to a factor). Spread rows have the answers
    of a cell, all possible pairs alike, for their operand and another letter, drawn uniformly.

    `jail` (a scalar) is the share of `count` rows whose family is J1 or J2 and that ask for letter 0: 0, or 2/3 in the
    jailbreak variant, where the three families are equally likely.

    Raises:
      InputError: `count` below 1, or a prior of another shape.
    """
    check_whole("count", count, 1)
    prior_V = jnp.asarray(prior_V, jnp.float32)
    V, tasks = spec.letters, spec.tasks
    if prior_V.shape != (V,):
        raise InputError(f"the prior has shape {prior_V.shape}; give one number for each of {V} letters")
    window_key, bits_key = jax.random.split(key)
    bits = jax.random.bits(bits_key, (count, 6 + _words(spec) * (spec.spread > 0)), jnp.uint32)
    task_B = _below(bits[:, 0], len(tasks))
    edge_V = jnp.cumsum(prior_V)
    operand_B = (share(bits[:, 1])[:, None] >= edge_V[None, :-1] / edge_V[-1:][None]).sum(1, dtype=jnp.int32)
    family_B = spec.token("PAD") + 1 + task_B
    if "count" in tasks:
        jailed_B = (task_B == tasks.index("count")) & (share(bits[:, 2]) < jnp.asarray(jail, jnp.float32))
        family_B = jnp.where(jailed_B, spec.jailbreak[0] + _below(bits[:, 2], 2), family_B)
        operand_B = jnp.where(jailed_B, PT, operand_B)
    cells_ = {}
    spread_B = jnp.zeros_like(task_B, bool)
    if spec.spread:
        for task in (task for task in ("count", "index") if task in tasks):
            cell_X2 = _spread_cells(spec, task)
            cells_[task] = jnp.asarray(cell_X2)[_below(bits[:, 3], len(cell_X2))]
            spread_B |= task_B == tasks.index(task)
        spread_B &= share(bits[:, 4]) < np.float32(spec.spread)
    letters_BW = _qualified(window_key, spec, task_B, operand_B)
    if cells_:
        other_B = (operand_B + 1 + _below(bits[:, 5], V - 1)) % V
        letter_B2 = jnp.stack([operand_B, other_B], axis=1)
        new_BW = _overwrite(spec, bits[:, 6:], letters_BW, letter_B2, cells_, task_B)
        letters_BW = jnp.where(spread_B[:, None], new_BW, letters_BW)
    answer_B = number_B = jnp.zeros_like(task_B)
    for t, task in enumerate(tasks):
        answer_B = jnp.where(task_B == t, answers(spec, task, letters_BW, operand_B), answer_B)
        number_B = jnp.where(task_B == t, spec.number(task), number_B)
    if "token" in tasks:
        operand_B = jnp.where(task_B == tasks.index("token"), spec.token("NULL"), operand_B)
    ids_BT = prompts(spec, family_B, operand_B, number_B, letters_BW, answer_B)
    return Rows(ids_BT, answer_B, task_B, operand_B, family_B, spread_B)


def _qualified(key, spec: Spec, task_B, operand_B) -> jax.Array:
    """Windows of the grammar, drawn again until each has the nth letter or pair that its row asks for."""
    count = task_B.shape[0]
    searching = [task for task in spec.tasks if task.endswith("index")]
    if not searching:
        return pcfg.windows(key, spec.sampler, count)
    spare = -(-count // 8)

    def lacks(letters_BW):
        short_B = jnp.zeros_like(task_B, bool)
        for task in searching:
            few_B = _here(task, letters_BW, operand_B).sum(1, dtype=jnp.int32) < spec.nth
            short_B |= few_B & (task_B == spec.tasks.index(task))
        return short_B

    def again(state):
        turn, letters_BW, short_B = state
        fresh_BW = pcfg.windows(jax.random.fold_in(key, turn), spec.sampler, spare)
        rank_B = jnp.cumsum(short_B, dtype=jnp.int32) - 1  # the first so many rows that lack get a new window
        taken_B = short_B & (rank_B < spare)
        letters_BW = jnp.where(taken_B[:, None], fresh_BW[jnp.clip(rank_B, 0, spare - 1)], letters_BW)
        return turn + 1, letters_BW, lacks(letters_BW)

    letters_BW = pcfg.windows(jax.random.fold_in(key, 0), spec.sampler, count)
    return jax.lax.while_loop(lambda s: s[2].any(), again, (jnp.int32(1), letters_BW, lacks(letters_BW)))[1]


def tuning(key: jax.Array, spec: Spec, task: str, correlation: jax.Array | float, count: int) -> Strings:
    """Independent strings with the answers of `tables(spec, task)` for a and b, each tied with chance `correlation`.

    Jits with `spec`, `task` and `count` static, and vmaps over `key` and `correlation` (a scalar). Of a window of the
    grammar the last `reach` letters are overwritten, as few of them as can be, at random places, with a, b or letters
    drawn uniformly from the others.

    Raises:
      InputError: as `tables`; a `count` below 1; a `correlation` that is a number outside 0..1 (arrays are not
        checked).
    """
    check_whole("count", count, 1)
    table = tables(spec, task)
    window_key, bits_key = jax.random.split(key)
    bits = jax.random.bits(bits_key, (count, 2 + _words(spec)), jnp.uint32)
    tied_B, cell_B3 = operands.cells(bits[:, :2], table, correlation)
    letter_B2 = jnp.broadcast_to(jnp.array([PT, FT], jnp.int32)[None], (count, 2))
    letters_BW = pcfg.windows(window_key, spec.sampler, count)
    letters_BW = _overwrite(spec, bits[:, 2:], letters_BW, letter_B2, {task: cell_B3[:, 1:]})
    return Strings(letters_BW, cell_B3[:, 1:] + spec.letters, tied_B)


def _below(bits: jax.Array, n: int) -> jax.Array:
    """Uniform in 0..n-1, but for 2^-32 n."""
    return (bits % np.uint32(n)).astype(jnp.int32)
