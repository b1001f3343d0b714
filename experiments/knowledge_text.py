"""Storing and extracting facts with small language models: the text half of `experiments.knowledge` (arXiv 2508.00901).

A causal transformer is pre-trained from scratch on facts in words, fine-tuned on "Q: ... A: answer" for some subjects
(the loss is on the answer and the end token alone), and asked about the others, by greedy generation with PopQA's
prompt and scoring. What is varied: K, in how many wordings a fact is read; the share of subjects that fine-tuning sees
(coverage); the rank of the adapters that are trained (0: everything). Two sets of facts:

    biographies  invented people (`synthetic.biographies`); K entries a person, each a biography of all attributes
    real         ParaRel and PopQA (`bert6_jax.data.facts`); K statements a fact, each a document of its own

Some subjects are in no text at all (`text_control`): the accuracy on them is what guessing reaches. All models of a
seed are asked about the same facts: of subjects that every fine-tuning sees, that none sees, that no text tells about.

The paper's language models are GPT-2 and Llama; models, sets, sizes and measures here are ours. Letters beside those of
`bert6_jax`: F facts, K wordings, N new tokens, Q facts that are asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bert6_jax import checkpoint, generate, lora, objectives, train, transformer
from bert6_jax.config import TransformerConfig, gpt_mini
from bert6_jax.data import facts as fact_data
from bert6_jax.data.facts import ANSWER, SUBJECT, Facts
from bert6_jax.data.pairs import padded
from bert6_jax.data.store import TokenStore
from bert6_jax.data.tokenizer import Tokenizer, load_tokenizer
from bert6_jax.data.vocabulary import trained_wordpiece
from bert6_jax.data.windows import Windows, make_windows, rows_at
from bert6_jax.errors import InputError
from experiments import apt
from experiments.harness import claims, figures
from experiments.harness.claims import Claim
from experiments.harness.cli import option
from experiments.harness.run import Run
from synthetic import biographies

PAPER = "2508.00901"
SETS = ("biographies", "real")
TRAIN, TEST, CONTROL = range(3)  # whose facts are asked: subjects of every fine-tuning, of none, of no text at all
ROWS = 64  # prompts that are answered at once
CHECKPOINT_EVERY = 1_000  # steps; a shorter training starts over
text_option = partial(option, group="text")


@dataclass(frozen=True)
class TextConfig:
    """Settings of the language models. All sizes are ours."""

    seed: int = option(0, "first seed: facts, wordings, split, initialisation, order", "run settings", min=0, max=10**9)
    seeds: int = option(3, "number of seeds; from 2 on intervals are over seeds", "run settings", min=1)

    text: tuple[str, ...] = text_option(("biographies",), "sets for language models; empty: none", choices=SETS)
    text_seeds: int = text_option(3, "seeds of the language models, from --seed on", min=1)
    text_multiplicities: tuple[int, ...] = text_option((1, 2, 4), "K: wordings that a fact is read in", min=1)
    tuned_shares: tuple[float, ...] = text_option(
        (0.1, 0.5), "shares of the subjects that fine-tuning sees", min=1e-6, max=0.999
    )
    text_ranks: tuple[int, ...] = text_option((0, 8), "ranks of the adapters; 0: all parameters", min=0)
    text_targets: tuple[str, ...] = text_option(lora.TARGETS, "matrices with adapters", choices=lora.TARGETS)
    text_control: float = text_option(0.1, "share of subjects that no text tells about", min=1e-6, max=0.9)
    text_asked: int = text_option(300, "facts asked of every kind (fine-tuned, held out, never told); 0: all", min=0)

    people: int = text_option(400, "people of the biographies", min=4)
    text_attributes: tuple[str, ...] = text_option(
        ("birth_city", "university", "company"), "what biographies tell", choices=biographies.ATTRIBUTES
    )
    text_values: int = text_option(30, "answers an attribute can have (invented ones)", min=2)
    text_wordings: int = text_option(8, "wordings an attribute has", min=1, max=biographies.WORDINGS)
    text_permute: bool = text_option(True, "shuffle the sentences of every biography")
    text_fullname: bool = text_option(True, "the full name in every sentence instead of a pronoun")
    fields: Path | None = text_option(None, "folder of bioS-like lists; none: invented words")

    pararel: Path | None = text_option(None, "ParaRel folder with patterns/ and facts/")
    pararel_relations: tuple[str, ...] = text_option(
        ("P740", "P20", "P27", "P19", "P106", "P36", "P1376"), "relations of it with enough wordings; empty: all"
    )
    popqa: Path | None = text_option(None, "PopQA's TSV")
    text_facts: int = text_option(200, "facts of a real relation, drawn by the seed; 0: all", min=0)

    text_vocab: Path | None = text_option(None, "vocab.txt or tokenizer.json; none: WordPiece trained on the text")
    text_vocab_size: int = text_option(4_000, "size of a vocabulary that is trained here", min=100)
    text_length: int = text_option(64, "positions of a row", min=8)
    text_blocks: int = text_option(4, "transformer blocks", min=1)
    text_width: int = text_option(128, "width of the residual stream", min=1)
    text_heads: int = text_option(4, "attention heads", min=1)

    text_steps: int = text_option(1_200, "pre-training steps, the same for every K", min=1)
    text_batch: int = text_option(16, "rows of a batch", min=1)
    text_lr: float = text_option(2e-3, "AdamW learning rate", min=0.0)
    text_schedule: str = text_option("warmup_linear", "schedule of all trainings", choices=train.STEP_SCHEDULES)
    text_tune_steps: int = text_option(200, "fine-tuning steps, the same for every share", min=1)
    text_tune_batch: int = text_option(32, "questions of a batch", min=1)
    text_tune_lr: float = text_option(5e-4, "AdamW learning rate of full fine-tuning", min=0.0)
    text_adapter_lr: float = text_option(3e-3, "AdamW learning rate of adapters", min=0.0)
    shots: int = text_option(0, "answered questions of other relations before each, at most; PopQA's code: 15", min=0)
    new_tokens: int = text_option(15, "tokens generated for an answer", min=1)

    def __post_init__(self):
        for name in ("text_multiplicities", "tuned_shares", "text_ranks", "text_targets", "text_attributes"):
            if not getattr(self, name):
                raise InputError(f"--{name.replace('_', '-')} is empty; give at least one value")
        if "biographies" in self.text and max(self.text_multiplicities) > self.text_wordings:
            raise InputError(
                f"--text-multiplicities {max(self.text_multiplicities)} is larger than --text-wordings "
                f"{self.text_wordings}; entries of a person differ in wording: lower the one or raise the other"
            )
        if self.text_width % self.text_heads:
            width, heads = self.text_width, self.text_heads
            raise InputError(f"--text-width {width} is not a multiple of --text-heads {heads}; change one of them")

    @property
    def axes(self) -> tuple[list[int], list[float], list[int]]:
        """K, shares and ranks, each in order."""
        return tuple(sorted(set(v)) for v in (self.text_multiplicities, self.tuned_shares, self.text_ranks))


# --- facts, their text, and who is asked -----------------------------------------------------------------------------


class World(NamedTuple):
    """The facts of one seed, the text about them, and the questions."""

    name: str
    seed: int
    facts: Facts
    documents: dict[int, list[str]]  # K -> pre-training text
    tuned: dict[float, np.ndarray]  # share -> indices of the facts of its subjects
    asked_Q: np.ndarray  # indices of facts
    kind_Q: np.ndarray  # TRAIN, TEST or CONTROL
    stems: dict[int, list[str]]  # K -> what a text says before the answer; "" for facts that no text tells
    new_stems: list[str]  # the same in a wording that the fact is not told in; "" if there is none
    tokenizer: Tokenizer
    accepted: list[tuple[str, ...]]  # answers of the asked facts, spelled as the tokenizer would
    model: TransformerConfig


def told_biographies(cfg: TextConfig, seed: int):
    """(facts, told_F, documents by K, stem by K of a told fact, worded_FK of the largest K)."""
    fields = biographies.read_fields(cfg.fields) if cfg.fields is not None else None
    documents, texts, A = {}, {}, len(cfg.text_attributes)
    for K in cfg.axes[0]:
        bio = biographies.BiographyConfig(
            cfg.people, cfg.text_attributes, cfg.text_wordings, K, cfg.text_permute, cfg.text_fullname,
            dates=cfg.text_values, cities=cfg.text_values, universities=cfg.text_values, fields=cfg.text_values,
            companies=cfg.text_values,
        )  # fmt: skip
        found = biographies.biographies(bio, seed, fields)
        told_F = told(cfg, found.facts, seed)
        documents[K], texts[K] = [], [[] for _ in range(cfg.people)]
        for document, person in zip(found.documents, biographies.persons(bio, seed).tolist(), strict=True):
            if told_F[person * A]:
                documents[K].append(document)
                texts[K][person].append(document)

    def stem(K: int, f: int) -> str:
        """The first entry of the person up to this answer; the subject there is a name or a pronoun."""
        fact = found.facts.facts[f]
        template = found.facts.statements[fact.relation][found.worded_FK[f, 0]]
        between = template.partition(ANSWER)[0].removeprefix(SUBJECT).removeprefix("'s")
        text = next(text for text in texts[K][f // A] if between + fact.answer in text)
        return text.partition(between + fact.answer)[0] + between.rstrip()

    return found.facts, told_F, documents, stem, found.worded_FK


def told_real(cfg: TextConfig, seed: int):
    """The same of ParaRel and PopQA: one statement a document."""
    sets = [fact_data.read_pararel(cfg.pararel, cfg.pararel_relations)] if cfg.pararel is not None else []
    sets += [fact_data.read_popqa(cfg.popqa)] if cfg.popqa is not None else []
    if not sets:
        raise InputError("--text real needs --pararel FOLDER or --popqa FILE; give one, or --text biographies")
    facts = once(fact_data.merge(*sets))
    if cfg.text_facts:
        place_F = generator(seed, 1).permutation(len(facts.facts))
        relation_F = np.array([fact.relation for fact in facts.facts])
        groups = [np.flatnonzero(relation_F == relation) for relation in dict.fromkeys(relation_F.tolist())]
        kept = np.sort(np.concatenate([of[np.argsort(place_F[of])][: cfg.text_facts] for of in groups]))
        facts = subset(facts, kept)
    told_F = told(cfg, facts, seed)
    documents = {}
    worded_FK = np.full((len(facts.facts), cfg.axes[0][-1]), -1, np.int32)
    for K in cfg.axes[0]:
        found = fact_data.render(subset(facts, np.flatnonzero(told_F)), K, seed)
        documents[K] = found.documents
        worded_FK[told_F, :K] = found.worded_FK

    def stem(K: int, f: int) -> str:
        return fact_data.stem(facts.statements[facts.facts[f].relation][worded_FK[f, 0]], facts.facts[f])

    return facts, told_F, documents, stem, worded_FK


def once(facts: Facts) -> Facts:
    """Facts of which none gives another away: one subject and question is one fact, with the answers of all sets, and
    of two facts that say the same the other way round (capital, capital of) the first stays."""
    accepted: dict[tuple[str, str], list[str]] = {}
    for fact in facts.facts:
        accepted.setdefault((fact.subject.casefold(), fact_data.question(facts, fact).casefold()), []).extend(
            fact.accepted
        )
    kept, pairs = [], set()
    for fact in facts.facts:
        subject = fact.subject.casefold()
        answers = accepted.pop((subject, fact_data.question(facts, fact).casefold()), None)
        if answers is None or any((answer.casefold(), subject) in pairs for answer in answers):
            continue
        pairs |= {(subject, answer.casefold()) for answer in answers}
        kept.append(fact._replace(accepted=tuple(dict.fromkeys(answers))))
    return facts._replace(facts=tuple(kept))


def generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array((seed, 2**40 + stream), np.uint64)))


def subset(facts: Facts, f: np.ndarray) -> Facts:
    return facts._replace(facts=tuple(facts.facts[i] for i in f))


def told(cfg: TextConfig, facts: Facts, seed: int) -> np.ndarray:
    """Which facts the texts tell, bool [F]; by subject."""
    told_F = np.zeros(len(facts.facts), bool)
    told_F[fact_data.split_subjects(facts, 1.0 - cfg.text_control, seed)[0]] = True
    return told_F


@lru_cache(maxsize=16)
def make_world(cfg: TextConfig, name: str, seed: int) -> World:
    """Everything of one set and seed but the models; says whatever is wrong with the settings or files."""
    facts, told_F, documents, stem, worded_FK = {"biographies": told_biographies, "real": told_real}[name](cfg, seed)
    (Ks, shares, _), told_f = cfg.axes, np.flatnonzero(told_F)
    splits = {share: fact_data.split_subjects(subset(facts, told_f), share, seed + 1) for share in shares}
    tuned = {share: told_f[split[0]] for share, split in splits.items()}
    # Subjects of a smaller share are among those of a larger one: the first is in all, the rest of the last in none.
    kinds = (tuned[shares[0]], told_f[splits[shares[-1]][1]], np.flatnonzero(~told_F))
    rng, most = generator(seed, 2), cfg.text_asked
    kinds = [np.sort(rng.permutation(f)[:most]) if most and len(f) > most else f for f in kinds]
    asked_Q = np.concatenate(kinds)
    kind_Q = np.repeat(np.arange(3), [len(f) for f in kinds])
    stems = {K: [stem(K, f) if told_F[f] else "" for f in asked_Q.tolist()] for K in Ks}
    new_stems = []
    for f, fact in ((f, facts.facts[f]) for f in asked_Q.tolist()):
        left = [t for k, t in enumerate(facts.statements[fact.relation]) if told_F[f] and k not in worded_FK[f]]
        new_stems.append(fact_data.stem(left[rng.integers(len(left))], fact) if left else "")

    if cfg.text_vocab is not None:
        tokenizer = load_tokenizer(cfg.text_vocab)
    else:  # the text of the largest K and the words of all questions and answers, also of subjects of no text
        asked = [f"{fact_data.question(facts, fact)} {fact.answer}" for fact in facts.facts]
        tokenizer = trained_wordpiece(documents[Ks[-1]] + asked, cfg.text_vocab_size)
    model = gpt_mini(
        -(-tokenizer.vocab_size // 256) * 256,  # so that seeds whose vocabularies differ a little share their programs
        width=cfg.text_width, blocks=cfg.text_blocks, heads=cfg.text_heads, head_width=cfg.text_width // cfg.text_heads,
        mlp_width=4 * cfg.text_width, max_len=cfg.text_length + cfg.new_tokens,
    )  # fmt: skip
    # Predictions come as the tokenizer spells them (case, accents, spaces), so what they are compared with does too.
    ids_QX = [tokenizer.encode_batch(facts.facts[f].accepted) for f in asked_Q.tolist()]
    known = [[ids for ids in ids_X if len(ids) and tokenizer.unk_id not in ids] for ids_X in ids_QX]
    accepted = [tuple(map(tokenizer.decode, ids_X)) for ids_X in known]
    world = World(name, seed, facts, documents, tuned, asked_Q, kind_Q, stems, new_stems, tokenizer, accepted, model)
    check_texts(cfg, world)
    return world


def check_texts(cfg: TextConfig, world: World) -> None:
    """Every answer is in the vocabulary, and no text is cut: documents, statements, questions with their answers."""
    ids_F = world.tokenizer.encode_batch([fact.answer for fact in world.facts.facts])
    for fact, ids in zip(world.facts.facts, ids_F, strict=True):
        if not len(ids) or (ids == world.tokenizer.unk_id).any():
            raise InputError(
                f"{world.name}: the answer {fact.answer!r} of {fact.subject!r} ({fact.relation}) is not in the "
                f"vocabulary; give a larger --text-vocab-size than {world.tokenizer.vocab_size}, another --text-vocab, "
                "or drop the fact"
            )
    texts = [text for documents in world.documents.values() for text in documents] + world.new_stems
    for share, tuned_f in world.tuned.items():
        f = np.union1d(world.asked_Q, tuned_f)
        answers = [world.facts.facts[i].answer for i in f]
        texts += [" ".join(pair) for pair in zip(prompts(cfg, world, f, share), answers, strict=True)]
    lengths = [len(ids) + 2 for ids in world.tokenizer.encode_batch(texts)]
    longest = int(np.argmax(lengths))
    if lengths[longest] > cfg.text_length:
        raise InputError(
            f"{world.name}: a text needs {lengths[longest]} positions ({texts[longest][:60]!r}...) and a row has "
            f"{cfg.text_length}; give --text-length {lengths[longest]} or more"
        )


def prompts(cfg: TextConfig, world: World, f: Sequence[int], share: float) -> list[str]:
    """The questions of facts, with shots from the facts that the fine-tuning of this share sees."""
    found = []
    for i in f:
        fact = world.facts.facts[int(i)]
        shots = fact_data.popqa_shots(world.facts, fact, world.tuned[share])[: cfg.shots] if cfg.shots else ()
        found.append(fact_data.prompt(world.facts, fact, shots))
    return found


def check(cfg: TextConfig) -> None:
    """Read and build everything that a study will need; whatever is wrong is an `InputError`."""
    if "real" not in cfg.text:
        for name in ("pararel", "popqa"):
            if getattr(cfg, name) is not None:
                raise InputError(f"--{name} is read by --text real alone, which is not asked for; add real to --text")
    for name in cfg.text:
        for seed in range(cfg.seed, cfg.seed + cfg.text_seeds):
            make_world(cfg, name, seed)


# --- training --------------------------------------------------------------------------------------------------------


def packed(cfg: TextConfig, world: World, K: int) -> Windows:
    """The text of multiplicity K, several documents a row, each its own segment."""
    ids_D = world.tokenizer.encode_batch(world.documents[K])
    offsets_D1 = np.concatenate([[0], np.cumsum([len(ids) for ids in ids_D], dtype=np.int64)])
    about = (world.name, "", world.tokenizer.sha256, world.tokenizer.vocab_size, 0)
    store = TokenStore(Path(world.name), np.concatenate(ids_D), offsets_D1, *about)  # in memory, nothing is cached
    return make_windows(store, world.tokenizer, length=cfg.text_length, pack=True, min_tokens=1)


def fit(run: Run, stage: str, optimizer: train.OptimizerConfig, steps: int, batch_at, width: int, step, params,
        frozen=None):  # fmt: skip
    """`train.fit` with the habits of this study: curves in the log, checkpoints of long runs only."""
    rows = len(batch_at(0)["row"])
    state = train.fit(
        step, train.init_state(params, train.make_optimizer(optimizer, steps, steps), jax.random.key(0)), batch_at,
        train.FitConfig(steps, min(20, steps), CHECKPOINT_EVERY), frozen=frozen, mesh=apt.mesh_for(rows),
        folder=run.out / "checkpoints" / "text" / f"{stage}-state" if steps > CHECKPOINT_EVERY else None,
        description={"stage": stage}, on_metrics=lambda number, values: run.log(stage, number, **values),
        on_start=lambda number: run.rewind(stage, number), label=stage, tokens_per_step=rows * width, quiet=run.quiet,
    )  # fmt: skip
    return jax.device_put(jax.device_get(state.params))  # to one device: nothing after training is spread


def pretrained(run: Run, cfg: TextConfig, world: World, K: int):
    """The model that has read the text of multiplicity K; kept as a checkpoint."""
    stage = stage_name(world, K)
    path = run.out / "checkpoints" / "text" / stage
    record = apt.describe(world.tokenizer) | {"file": f"checkpoints/text/{world.name}-seed{world.seed}-tokenizer.json"}
    params = jax.jit(transformer.init, static_argnums=1)(jax.random.key(world.seed), world.model)
    if path.exists():
        saved = checkpoint.load(path, kind="transformer", like=params)
        if saved.tokenizer != record:
            raise InputError(f"{path} belongs to another vocabulary; remove that folder or use another --out")
        return saved.tree
    optimizer = train.OptimizerConfig(cfg.text_lr, b2=0.98, schedule=cfg.text_schedule)
    batch_at = apt.batches(packed(cfg, world, K), world.seed, cfg.text_batch)
    step = apt.lm_step(world.model, None, optimizer)
    params = fit(run, stage, optimizer, cfg.text_steps, batch_at, cfg.text_length, step, params)
    if run.primary:
        path.parent.mkdir(parents=True, exist_ok=True)
        world.tokenizer.save(run.out / record["file"])
    about = {"config": dataclasses.asdict(world.model), "step": cfg.text_steps, "tokenizer": record}
    checkpoint.save(path, params, kind="transformer", **about)
    return params


@cache
def adapter_step(model: TransformerConfig, adapters: lora.LoraConfig, optimizer: train.OptimizerConfig):
    """The step that trains adapters of a frozen model."""
    loss_fn = objectives.next_token(model)

    def grads_and_sums(trained, batch, key, frozen):
        def loss(trained):
            return loss_fn(lora.apply(frozen, trained, adapters), batch, key)

        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        return grads, sums

    return train.make_step(grads_and_sums, train.make_optimizer(optimizer, 1, 1))


def question_rows(cfg: TextConfig, world: World, share: float) -> dict[str, np.ndarray]:
    """[CLS] Q: ... A: answer [SEP] for the facts of a share; `predict` marks the answer and [SEP]."""
    f, tokenizer = world.tuned[share], world.tokenizer
    asked = tokenizer.encode_batch(prompts(cfg, world, f, share))
    answers = tokenizer.encode_batch([world.facts.facts[i].answer for i in f.tolist()])
    rows = [[tokenizer.cls_id, *q, *a, tokenizer.sep_id] for q, a in zip(asked, answers, strict=True)]
    width = min(-(-max(map(len, rows)) // 8) * 8, cfg.text_length)
    ids, segment = padded(rows, width, tokenizer.pad_id)
    answer_at = 1 + np.array([len(q) for q in asked])
    return {"ids": ids, "segment": segment, "predict": (np.arange(width) >= answer_at[:, None]) & (segment > 0)}


def tuned(run: Run, cfg: TextConfig, world: World, params, K: int, share: float, rank: int):
    """The model after fine-tuning on the questions of a share: all parameters, or adapters merged into them."""
    stage = stage_name(world, K, share, rank)
    rows = question_rows(cfg, world, share)
    count, width = rows["ids"].shape

    def batch_at(step: int) -> dict[str, np.ndarray]:
        row_B, valid_B = rows_at(world.seed + 1_000_003, step, count, cfg.text_tune_batch)
        return {name: values[row_B] for name, values in rows.items()} | {"row": row_B, "valid": valid_B}

    lr = cfg.text_adapter_lr if rank else cfg.text_tune_lr
    optimizer = train.OptimizerConfig(lr, weight_decay=0.0, b2=0.98, schedule=cfg.text_schedule)
    train_on = partial(fit, run, stage, optimizer, cfg.text_tune_steps, batch_at, width)
    if not rank:
        return train_on(apt.lm_step(world.model, None, optimizer), params)
    adapters = lora.LoraConfig(rank, cfg.text_targets)
    trained = lora.init(jax.random.key(world.seed + 1), params, adapters)
    return lora.apply(params, train_on(adapter_step(world.model, adapters, optimizer), trained, params), adapters)


# --- asking ----------------------------------------------------------------------------------------------------------


def complete(cfg: TextConfig, world: World, params, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The greedy continuation of every text, int32 [Q, N] and its probabilities; [SEP] ends it."""
    tokenizer, parts = world.tokenizer, []
    encoded = [[tokenizer.cls_id, *ids] for ids in tokenizer.encode_batch(list(texts))]
    for begin in range(0, len(encoded), ROWS):
        part = encoded[begin : begin + ROWS]
        part += part[:1] * (ROWS - len(part))
        ids_BT, segment_BT = padded(part, world.model.max_len, tokenizer.pad_id)
        stop = (tokenizer.sep_id,)
        parts.append(generate.generate(params, ids_BT, segment_BT.sum(1), world.model, cfg.new_tokens, stop))
    return tuple(np.concatenate(jax.device_get(of))[: len(texts)] for of in zip(*parts, strict=True))


def completed(cfg: TextConfig, world: World, params, stems: Sequence[str]) -> np.ndarray:
    """Is a statement continued by its answer's first N tokens? int8 [Q]: 1 yes, 0 no, -1 there is no statement."""
    answers = world.tokenizer.encode_batch([world.facts.facts[f].answer for f in world.asked_Q.tolist()])
    ids_QN, _ = complete(cfg, world, params, stems)
    rows = zip(stems, ids_QN, answers, strict=True)
    return np.array([np.array_equal(ids[: len(a)], a[: len(ids)]) if stem else -1 for stem, ids, a in rows], np.int8)


def answered(cfg: TextConfig, world: World, params, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """What the model says to every prompt, and with which mean token probability ([SEP] included)."""
    ids_QN, p_QN = complete(cfg, world, params, texts)
    stop_QN = ids_QN == world.tokenizer.sep_id
    length_Q = np.where(stop_QN.any(1), stop_QN.argmax(1), ids_QN.shape[1])
    said = [world.tokenizer.decode(ids_N[:n]) for ids_N, n in zip(ids_QN, length_Q.tolist(), strict=True)]
    used_QN = np.arange(ids_QN.shape[1])[None] <= length_Q[:, None]
    p_Q = np.where(used_QN, p_QN, 0.0).sum(1) / used_QN.sum(1)
    return {"said": np.array(said), "probability": p_Q.astype(np.float32)}


# --- the study -------------------------------------------------------------------------------------------------------


class Results(NamedTuple):
    """All that was measured."""

    worlds: dict[str, list[World]]  # set -> one a seed
    before: dict[tuple[str, int, int], dict[str, np.ndarray]]  # (set, number of the seed, K) -> before fine-tuning
    after: dict[tuple[str, int, int, float, int], dict[str, np.ndarray]]  # (..., K, share, rank)
    scores: dict[tuple[str, int, int, float, int], dict[str, float]]  # see `score`


def study(run: Run, cfg: TextConfig) -> Results:
    """Every model of every set, multiplicity and seed: pre-trained, asked, fine-tuned, asked again."""
    worlds = {name: [make_world(cfg, name, cfg.seed + s) for s in range(cfg.text_seeds)] for name in cfg.text}
    results = Results(worlds, {}, {}, {})
    Ks, shares, ranks = cfg.axes
    for name, s, K in ((name, s, K) for name in worlds for s in range(cfg.text_seeds) for K in Ks):
        world = worlds[name][s]
        text = hashlib.sha256(json.dumps([world.documents[K], world.asked_Q.tolist()]).encode()).hexdigest()
        run.keep_record(f"{stage_name(world, K)}-text", {"text": text, "vocabulary": world.tokenizer.sha256})
        model = cache(partial(pretrained, run, cfg, world, K))

        def before(world=world, K=K, model=model) -> dict[str, np.ndarray]:
            questions = [fact_data.question(world.facts, world.facts.facts[f]) for f in world.asked_Q.tolist()]
            found = {"stored": completed(cfg, world, model(), world.stems[K])}
            found |= {"new": completed(cfg, world, model(), world.new_stems)}
            return found | answered(cfg, world, model(), questions)

        results.before[name, s, K] = run.stage(stage_name(world, K), before)
        for share, rank in itertools.product(shares, ranks):

            def after(world=world, K=K, model=model, share=share, rank=rank) -> dict[str, np.ndarray]:
                params = tuned(run, cfg, world, model(), K, share, rank)
                return answered(cfg, world, params, prompts(cfg, world, world.asked_Q, share))

            cell = (name, s, K, share, rank)
            results.after[cell] = run.stage(stage_name(world, K, share, rank), after)
            results.scores[cell] = score(world, results.before[name, s, K], results.after[cell], share)
    return results


def stage_name(world: World, K: int, share: float = 0.0, rank: int = 0) -> str:
    """Of the stages before fine-tuning, without a share, and after it."""
    return f"text-{world.name}-k{K}-seed{world.seed}" + (f"-share{share!r}-rank{rank}" if share else "")


def hits(world: World, said: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Right by PopQA's score (an accepted answer is a substring) and as whole words, bool [Q] each."""
    predictions = [fact_data.first_answer(str(text)) for text in said]
    pairs = list(zip(predictions, world.accepted, strict=True))
    correct, exact = fact_data.popqa_correct, fact_data.exact_match
    return tuple(np.array([rule(text, accepted) for text, accepted in pairs], bool) for rule in (correct, exact))


METRICS = {
    "stored": "own statements completed, before fine-tuning",
    "new_wording": "completed in a wording the fact was never told in",
    "zero_shot": "questions answered before fine-tuning",
    "fine_tuned": "questions of fine-tuned subjects answered",
    "extraction": "questions of held-out subjects answered",
    "exact": "the same, by whole words",
    "several": "extraction where the subject has other answers too, so that the question matters",
    "answer_seen": "extraction where the answer occurs in the fine-tuning set",
    "answer_unseen": "extraction where it does not",
    "never_told": "questions of subjects that no text tells about",
    "majority": "the relation's most frequent answer of the fine-tuning set, on held-out subjects",
    "not_extracted": "stored facts of held-out subjects that are not extracted",
    "hallucination": "of these, answered wrongly with a mean token probability above 0.5 (ours)",
}


def score(world: World, before: dict, after: dict, share: float) -> dict[str, float]:
    """The numbers of one cell, see `METRICS`; NaN where there is no such fact."""
    facts, tuned_f = world.facts, world.tuned[share]
    right_Q, exact_Q = hits(world, after["said"])
    zero_Q, _ = hits(world, before["said"])
    train_Q, test_Q, control_Q = (world.kind_Q == kind for kind in (TRAIN, TEST, CONTROL))
    seen = {facts.facts[f].answer for f in tuned_f.tolist()}
    seen_Q = np.array([facts.facts[f].answer in seen for f in world.asked_Q.tolist()])
    answers: dict[str, set[str]] = {}
    for fact in facts.facts:
        answers.setdefault(fact.subject, set()).add(fact.answer)
    several_Q = np.array([len(answers[facts.facts[f].subject]) > 1 for f in world.asked_Q.tolist()])
    stored_Q = before["stored"] == 1

    majority = fact_data.majority(facts, tuned_f, world.asked_Q[test_Q]).values()
    of = {
        "stored": (stored_Q, before["stored"] >= 0),
        "new_wording": (before["new"] == 1, before["new"] >= 0),
        "zero_shot": (zero_Q, test_Q),
        "fine_tuned": (right_Q, train_Q),
        "extraction": (right_Q, test_Q),
        "exact": (exact_Q, test_Q),
        "several": (right_Q, test_Q & several_Q),
        "answer_seen": (right_Q, test_Q & seen_Q),
        "answer_unseen": (right_Q, test_Q & ~seen_Q),
        "never_told": (right_Q, control_Q),
        "not_extracted": (~right_Q, test_Q & stored_Q),
        "hallucination": (after["probability"] > 0.5, test_Q & stored_Q & ~right_Q),
    }
    found = {name: float(hit_Q[among_Q].mean()) if among_Q.any() else math.nan for name, (hit_Q, among_Q) in of.items()}
    return found | {"majority": sum(hit for hit, _ in majority) / sum(count for _, count in majority)}


def values(cfg: TextConfig, results: Results, name: str, metric: str) -> np.ndarray:
    """A metric over [seed, K, share, rank]."""
    Ks, shares, ranks = cfg.axes
    cells = itertools.product(range(cfg.text_seeds), Ks, shares, ranks)
    flat = [results.scores[name, *cell][metric] for cell in cells]
    return np.array(flat).reshape(cfg.text_seeds, len(Ks), len(shares), len(ranks))


# --- claims ----------------------------------------------------------------------------------------------------------


def text_claims(cfg: TextConfig, results: Results) -> list[Claim]:
    """The paper's predictions for language models, on every set. The rules are ours and older than the runs."""
    found, (Ks, shares, ranks) = [], cfg.axes
    for name in results.worlds:
        value = partial(values, cfg, results, name)
        extraction_SKXR, majority_SKXR = value("extraction"), value("majority")
        largest = f"K = {Ks[-1]} and {shares[-1]:.0%} of the subjects"

        def claim(key: str, where: str, statement: str, expected: str, outcome, name=name) -> None:
            found.append(Claim(f"text_{key}_{name}", f"{PAPER}, {where}", f"{name}: {statement}", expected, *outcome))

        def rises(values_SX: np.ndarray, what: str):
            if values_SX.shape[1] < 2:
                return claims.not_tested(f"needs two or more values of {what}", len(values_SX))
            return claims.increasing(values_SX)

        claim("stored", "P7", "every model completes the statements it has read (the least over K)", "1",
              claims.greater_than(value("stored")[:, :, 0, 0].min(1), 0.9))  # fmt: skip
        claim("zero_shot", "P7", "before fine-tuning questions are answered no better than by the "
              "majority answer (difference, the best over K; 0.05 is allowed for chance)", "<= 0",
              claims.within((value("zero_shot") - majority_SKXR)[:, :, -1, 0].max(1), -1.0, 0.05))  # fmt: skip
        for r, rank in enumerate(ranks):
            how = f"LoRA of rank {rank}" if rank else "full fine-tuning"
            claim(f"rank{rank}", "P8", f"after {how} held-out subjects are answered better than by the majority answer "
                  f"(difference, {largest})", "> 0",
                  claims.greater_than((extraction_SKXR - majority_SKXR)[:, -1, -1, r], 0.0))  # fmt: skip
        mean_SKX = extraction_SKXR.mean(-1)
        claim("guessing", "P4", "subjects that were read about are answered better than those that were not "
              f"(difference, mean over ranks, {largest})", "> 0",
              claims.greater_than((extraction_SKXR - value("never_told"))[:, -1, -1].mean(-1), 0.0))  # fmt: skip
        claim("multiplicity", "P4", "extraction rises with K, the wordings of a fact (mean over shares and ranks)",
              "rises", rises(mean_SKX.mean(2), "K"))  # fmt: skip
        claim("coverage", "P5", "extraction rises with the share of subjects in fine-tuning (mean over K and ranks; "
              "more answers are shown, too: the table splits by them)",
              "rises", rises(mean_SKX.mean(1), "the share"))  # fmt: skip
        claim("not_extracted", "P7", "at the smallest K and share most of what is stored is not extracted (mean over "
              "ranks)", "> 0.5", claims.greater_than(value("not_extracted")[:, 0, 0].mean(-1), 0.5))  # fmt: skip
        beyond_SKXR = value("answer_unseen") - value("never_told")  # a large share would show nearly all answers
        claim("unseen_answers", "P4", "answers that fine-tuning has never shown are extracted too, more often than "
              "guessed for subjects of no text (difference, mean over ranks, largest K, smallest share)", "> 0",
              claims.greater_than(beyond_SKXR[:, -1, 0].mean(-1), 0.0))  # fmt: skip
    return found


# --- tables and figures ----------------------------------------------------------------------------------------------


def report_text(run: Run, cfg: TextConfig, results: Results) -> None:
    """Tables and figures of every set."""
    if not results.worlds:
        return
    Ks, shares, ranks = cfg.axes
    rows = [
        {"set": name, "multiplicity": Ks[k], "share": shares[x], "rank": ranks[r],
         "metric": metric} | claims.interval(values_SKXR[:, k, x, r]) | {"seeds": cfg.text_seeds}
        for name in results.worlds
        for metric in METRICS
        for values_SKXR in [values(cfg, results, name, metric)]
        for k, x, r in np.ndindex(values_SKXR.shape[1:])
    ]  # fmt: skip
    about = "; ".join(f"{metric}: {words}" for metric, words in METRICS.items())
    run.table("text_extraction", rows, f"Language models, by K, share of subjects in fine-tuning and rank. {about}.")
    answers = [row for name in results.worlds for row in held_out(cfg, results, name)]
    relations = [row for name in results.worlds for row in by_relation(cfg, results, name, answers)]
    cell = f"K = {Ks[-1]}, share {shares[-1]:g}, rank {ranks[0]}"
    run.table(
        "text_relations", relations, f"Held-out facts by relation, beside the majority answer; {cell}, all seeds."
    )
    run.table("text_answers", answers, f"What is said to the questions of held-out subjects; {cell}, all seeds.")
    for name in results.worlds:
        draw(run, cfg, results, name, [row for row in relations if row["set"] == name])


def held_out(cfg: TextConfig, results: Results, name: str) -> list[dict[str, Any]]:
    """Every held-out fact that is asked, at the largest K and share and the first rank."""
    rows, ((*_, K), (*_, share), (rank, *_)) = [], cfg.axes
    for s, world in enumerate(results.worlds[name]):
        before, after = results.before[name, s, K], results.after[name, s, K, share, rank]
        right_Q, exact_Q = hits(world, after["said"])
        for q in np.flatnonzero(world.kind_Q == TEST).tolist():
            fact = world.facts.facts[world.asked_Q[q]]
            rows.append({
                "set": name, "seed": world.seed, "relation": fact.relation, "subject": fact.subject,
                "answer": fact.answer, "said": str(after["said"][q]), "probability": float(after["probability"][q]),
                "stored": bool(before["stored"][q] == 1), "extracted": bool(right_Q[q]), "exact": bool(exact_Q[q]),
            })  # fmt: skip
    return rows


def by_relation(cfg: TextConfig, results: Results, name: str, answers: Sequence[dict]) -> list[dict[str, Any]]:
    """Means of `held_out` by relation, all seeds together, and what the majority answer gets."""
    rows, worlds, share = [], results.worlds[name], cfg.axes[1][-1]
    majority = [fact_data.majority(w.facts, w.tuned[share], w.asked_Q[w.kind_Q == TEST]) for w in worlds]
    for relation in dict.fromkeys(row["relation"] for row in answers if row["set"] == name):
        of = [row for row in answers if (row["set"], row["relation"]) == (name, relation)]
        question = worlds[0].facts.questions[relation].replace(SUBJECT, "...")
        row = {"set": name, "relation": relation, "question": question, "facts": len(of)}
        row |= {key: float(np.mean([row[key] for row in of])) for key in ("stored", "extracted", "exact")}
        rows.append(row | {"majority": sum(counts.get(relation, (0, 0))[0] for counts in majority) / len(of)})
    return rows


@figures.style()
def draw(run: Run, cfg: TextConfig, results: Results, name: str, relations: Sequence[dict]) -> None:
    value, (Ks, shares, ranks) = partial(values, cfg, results, name), cfg.axes
    K_names, hows = [f"K = {K}" for K in Ks], [f"LoRA {r}" if r else "full" for r in ranks]

    fig, ax = figures.new(height=3.6)
    bars = {"stored": value("stored")[:, :, 0, 0], "new wording": value("new_wording")[:, :, 0, 0]}
    bars |= {"question, zero-shot": value("zero_shot")[:, :, 0, 0]}
    bars |= {f"question, {how}": value("extraction")[:, :, -1, r] for r, how in enumerate(hows)}
    bars = {label: values_SK.T for label, values_SK in bars.items()}
    figures.grouped_bars(ax, K_names, bars, error_kw={"linewidth": 1})
    for metric, style, label in (("majority", "--", "majority answer"), ("never_told", ":", "never told")):
        ax.axhline(value(metric)[:, :, -1].mean(), color="#555555", linestyle=style, linewidth=1.2, label=label)
    ax.set(ylabel="share of facts", ylim=(0, 1.02), title=f"Stored and extracted, {name}")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    run.figure(
        f"text_stored_{name}", fig, alt="Bars of stored and extracted facts by the number of wordings",
        caption=f"{name}: facts completed in their own and in a new wording before fine-tuning, and questions of "
        f"held-out subjects answered before and after it ({shares[-1]:.0%} of the subjects fine-tuned). Dashed: "
        "majority answer; dotted: subjects that no text tells about.",
    )  # fmt: skip

    fig, axes = figures.new(1, len(hows), height=3.4, sharey=True, squeeze=False)
    for r, (ax, how) in enumerate(zip(axes[0], hows, strict=True)):
        for k, colour in enumerate(figures.shades(len(K_names))):
            figures.seed_band(ax, shares, value("extraction")[:, k, :, r], label=K_names[k], color=colour)
        for metric, style, label in (("majority", "--", "majority answer"), ("never_told", ":", "never told")):
            mean_X = value(metric)[..., r].mean((0, 1))
            figures.line(ax, shares, mean_X, label=label, color="#777777", linestyle=style, marker="")
        ax.set(xlabel="share of subjects in fine-tuning", title=f"{name}, {how}", ylim=(0, 1.02))
        ax.set_xticks(shares, [f"{share:g}" for share in shares])
    axes[0, 0].set_ylabel("held-out questions answered")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    run.figure(
        f"text_coverage_{name}", fig, alt="Extraction against the share of subjects in fine-tuning, a line for each K",
        caption=f"{name}: questions of held-out subjects answered (PopQA's score) against the share of subjects that "
        "fine-tuning sees. Bands: 95 % interval over seeds, where there are several.",
    )  # fmt: skip

    relations = sorted(relations, key=lambda row: row["extracted"])
    fig, ax = figures.new(height=1.2 + 0.36 * len(relations))
    place = np.arange(len(relations))
    colours = (figures.PALETTE[5], figures.PALETTE[0], "#999999")
    for i, (metric, colour) in enumerate(zip(("stored", "extracted", "majority"), colours, strict=True)):
        ax.barh(place + 0.27 * (1 - i), [row[metric] for row in relations], 0.27, color=colour, label=metric)
    texts = [f"{row['relation'].replace('_', ' ')}: {row['question']} ({row['facts']})" for row in relations]
    ax.set_yticks(place, [figures.plain(text[:64]) for text in texts], fontsize=7.5)
    ax.set(xlabel="share of held-out facts", xlim=(0, 1.02), ylim=(-0.6, len(place) - 0.4))
    ax.set_title(f"By relation, {name}")
    ax.grid(False, axis="y")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    run.figure(
        f"text_relations_{name}", fig, alt="Stored and extracted facts of every relation beside the majority answer",
        caption=f"{name}: held-out facts by relation (how many), {K_names[-1]}, {shares[-1]:.0%} of the subjects "
        f"fine-tuned, {hows[0]}. Grey: the relation's most frequent answer of the fine-tuning set.",
    )  # fmt: skip
