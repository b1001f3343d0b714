"""Accuracy per token along the blocks of BERT-6 (arXiv 2509.03407): from text to report.

    python -m experiments.apt                                                  a demo on generated text, four minutes
    python -m experiments.apt --preset small --corpus FOLDER --vocab vocab.txt   real text, a small BERT-6
    python -m experiments.apt --preset paper --corpus tfds:wiki40b/en --vocab vocab.txt   the paper's scale, GPU or TPU

    python -m experiments.apt --preset small --corpus FOLDER --vocab vocab.txt --task fewrel --task-data FOLDER

Read from top to bottom: settings, corpus, pre-training, readout of every depth, evaluation, results, claims, figures;
fine-tuning (`--task`) goes on in `experiments.apt_finetune`. Definitions follow `bert6_jax.metrics`. Letters beside
those of `bert6_jax`: R readouts (the M depths in order, then the model's own head at the last block), G groups of
held-out articles, Q frequency bins, P thresholds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax import checkpoint, metrics, objectives, parallel, readout, train, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.data.sources import TextSource, open_source
from bert6_jax.data.store import build_store
from bert6_jax.data.tokenizer import Tokenizer, load_tokenizer
from bert6_jax.data.vocabulary import trained_wordpiece
from bert6_jax.data.windows import (
    Windows,
    make_windows,
    rows_at,
    split_documents,
    steps_per_epoch,
    token_frequencies,
)
from bert6_jax.errors import InputError
from bert6_jax.masking import MaskingConfig
from bert6_jax.progress import Progress
from experiments import apt_finetune
from experiments.apt_finetune import FinetuneConfig
from experiments.harness import claims, cli, figures, report
from experiments.harness.claims import Claim
from experiments.harness.cli import option
from experiments.harness.run import Run, peak_flops
from synthetic import language

PAPER = "2509.03407"
GROUPS = 20  # of held-out articles, the unit of the intervals of a single seed


@dataclass(frozen=True)
class PretrainConfig:
    """Corpus, model, pre-training."""

    corpus: str = option("embedded", "`embedded`, a file or folder of .txt/.jsonl/.jsonl.gz, or tfds:NAME", "data")
    vocab: Path | None = option(None, "vocab.txt or tokenizer.json; none: train WordPiece on the corpus", "data")
    vocab_size: int = option(30_522, "size of a vocabulary that is trained here", "data", min=100)
    documents: int = option(0, "articles of the embedded corpus to generate", "data", min=0)
    subset_sizes: tuple[int, ...] = option((90_000,), "W_S: nested training subsets, articles", "data", min=1)
    held_out: int = option(5_000, "W_test: articles that no subset holds (ours)", "data", min=1)
    split_seed: int = option(42, "seed of the permutation that makes W_S and W_test", "data", min=0, max=2**31 - 1)
    window: str = option(
        "first", "`first` window of each article, as the paper, or `all`", "data", choices=("first", "all")
    )
    pack: bool = option(False, "put short articles together in one row (not of the paper)", "data")
    length: int = option(128, "positions of a row, [CLS] and [SEP] included", "data", min=5)

    blocks: int = option(6, "transformer blocks", "model", min=1)
    width: int = option(768, "width of the residual stream", "model", min=1)
    heads: int = option(12, "attention heads", "model", min=1)
    mlp_width: int = option(3_072, "hidden units of the MLP", "model", min=1)
    dropout: float = option(0.1, "dropout of hidden units and attention", "model", min=0.0)
    dtype: str = option("float32", "dtype of the matrix products", "model", choices=("float32", "bfloat16"))

    seed: int = option(0, "first seed: initialisation, order and masks", "training", min=0, max=10**9)
    seeds: int = option(1, "number of seeds; from 2 on intervals are over seeds", "training", min=1)
    epochs: int = option(50, "passes over the training subset", "training", min=1)
    batch: int = option(32, "rows of a batch", "training", min=1)
    lr: float = option(5e-5, "AdamW learning rate", "training", min=0.0)
    weight_decay: float = option(0.01, "AdamW weight decay, on all parameters", "training", min=0.0)
    schedule: str = option("epoch_linear", "learning-rate schedule", "training", choices=train.SCHEDULES)
    warmup: float = option(0.1, "share of the steps that warm up (warmup_linear)", "training", min=0.0, max=1.0)
    b2: float = option(0.999, "AdamW b2, decay of the second moment", "training", min=0.0, max=1.0)
    mask_rate: float = option(0.15, "share of positions modified in training; evaluation: 0.15", "training", max=1.0)
    slots: int = option(40, "prediction slots of a row; positions beyond are counted, not used", "training", min=1)
    unknown_targets: bool = option(True, "may [UNK] be a target, as in the authors' masking", "training")
    dispatch: int = option(4, "steps sent to the device at once", "training", min=1)
    checkpoint_every: int = option(1_000, "steps between checkpoints", "training", min=1)
    snapshots: int = option(0, "snapshots at equal distances, beside those at 0, 1, 2, 4, ...", "training", min=0)

    def __post_init__(self):
        if not self.subset_sizes:
            raise InputError("--subset-sizes is empty; give at least one value")

    def model(self, vocab_size: int) -> TransformerConfig:
        if self.width % self.heads:
            raise InputError(f"--width {self.width} is not a multiple of --heads {self.heads}; change one of them")
        return TransformerConfig(
            vocab_size, self.width, self.blocks, self.heads, self.width // self.heads, self.mlp_width, self.length,
            dropout=self.dropout, attention_dropout=self.dropout, dtype=self.dtype,
        )  # fmt: skip


@dataclass(frozen=True)
class EvaluationConfig(PretrainConfig):
    """Readout, evaluation."""

    readout: str = option("linear", "head that reads a depth (ours)", "readout", choices=readout.VARIANTS)
    readout_epochs: float = option(5.0, "passes over the training subset for the readouts (ours)", "readout", min=0.0)
    readout_lr: float = option(5e-5, "AdamW learning rate of the readouts (ours)", "readout", min=0.0)
    readout_schedule: str = option("epoch_linear", "its schedule (ours)", "readout", choices=train.SCHEDULES)
    untrained_control: bool = option(True, "also read an untrained trunk", "readout")

    passes: int = option(10, "maskings of every held-out window (ours)", "evaluation", min=1)
    count_modes: tuple[str, ...] = option(
        metrics.MODES, "corruption modes that count", "evaluation", choices=metrics.MODES
    )
    min_count: int = option(1, "occurrences that an id needs to enter <APT>", "evaluation", min=1)
    theta: float = option(0.1, "strong match: R_ij >= theta (ours, unpublished)", "evaluation", min=1e-6, max=1.0)
    thetas: tuple[float, ...] = option(
        (0.05, 0.1, 0.2, 0.3, 0.5), "thresholds of the sweep (ours)", "evaluation", min=1e-6
    )
    n_min: int = option(1, "right predictions that an id needs to enter a cluster", "evaluation", min=1)

    def __post_init__(self):
        super().__post_init__()
        if not self.count_modes:
            raise InputError("--count-modes is empty; give at least one value")

    @property
    def sweep(self) -> list[float]:
        """The thresholds that clusters are counted at, in order; `theta` is one of them."""
        return sorted({*self.thetas, self.theta})


@dataclass(frozen=True)
class AptConfig(FinetuneConfig, EvaluationConfig):
    """Every setting that can change a result. What the paper leaves open is marked (ours) in the help."""


PAPER_CONFIG = AptConfig(corpus="", subset_sizes=(20_000, 40_000, 90_000))
PRESETS = {
    "demo": AptConfig(
        documents=14_000, vocab_size=600, subset_sizes=(1_250, 12_500), held_out=1_000, length=15,
        width=64, heads=4, mlp_width=256, dropout=0.0, epochs=7, batch=64, lr=4e-3, schedule="warmup_linear",
        b2=0.98, mask_rate=0.35, slots=8, dispatch=20, checkpoint_every=400, readout_epochs=1.5, readout_lr=1e-2,
        readout_schedule="warmup_linear", passes=6,
        task=("embedded",), finetune_epochs=16, finetune_lr=2e-3, finetune_schedule="warmup_linear", adapter_lr=5e-3,
        probe_steps=300, transfer_snapshots=1,
    ),
    "small": AptConfig(
        corpus="", subset_sizes=(4_500, 18_000), held_out=1_247, width=128, heads=4, mlp_width=512, dropout=0.0,
        epochs=1, batch=16, lr=1e-3, schedule="warmup_linear", slots=30, checkpoint_every=100,
        readout_epochs=0.25, readout_lr=5e-3, readout_schedule="warmup_linear", passes=2,
        train_per_class=100, test_per_class=70, finetune_epochs=10, finetune_lr=5e-4, finetune_schedule="warmup_linear",
        adapter_lr=5e-3, transfer_snapshots=2,
    ),
    "paper": PAPER_CONFIG,
}  # fmt: skip


# --- corpus ----------------------------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """Text as the study needs it: rows of the training subsets and of the held-out articles, and what is known."""

    tokenizer: Tokenizer
    masking: MaskingConfig  # of training; evaluation always modifies 0.15, as the paper
    training: dict[int, Windows]  # W_S -> its rows
    held_out: Windows
    frequency_V: np.ndarray  # int64, occurrences in the largest subset
    include_V: np.ndarray  # bool, ids that APT is defined for: no specials
    lang: language.Language | None  # the generator of the embedded corpus
    description: str


# Documents of one sentence: which member of a class is meant is told by a cue that is found by what it is and not by
# where it stands, so a small BERT-6 learns the language from a million tokens.
DEMO_LANGUAGE = language.LanguageConfig(
    topics=5,
    side_topic=0.0,
    members=(("subject", 3), ("verb", 3), ("object", 4), ("place", 3)),
    min_tokens=6,
    templates=(
        ("det subject~ subject aux verb~ verb the object~ object .", 1.0),
        ("det subject~ subject place~ place aux verb~ verb the object~ object .", 0.8),
        ("det subject~ subject aux verb~ verb place~ place .", 0.6),
        ("place~ place , det subject~ subject aux verb~ verb the object~ object .", 0.6),
    ),
)


def load_corpus(
    run: Run,
    cfg: PretrainConfig,
    embedded: language.LanguageConfig = DEMO_LANGUAGE,
    extra: Callable[[language.Language], list[str]] = lambda lang: [],
) -> Corpus:
    """Read or generate the text, tokenise it into the store, split it and cut it into windows.

    `embedded` is the language that is generated, `extra` gives documents that are added to it.
    """
    lang = None
    if cfg.corpus == "embedded":
        if not cfg.documents:
            raise InputError("--corpus embedded needs --documents N, the number of articles to generate")
        lang = language.make_language(embedded)
        texts = language.sample_documents(lang, cfg.documents, seed=cfg.split_seed) + extra(lang)
        made = repr((lang.config, cfg.documents, cfg.split_seed)).encode()
        shown = "\n".join(texts[:100] + texts[cfg.documents :])
        source = TextSource("embedded", texts, hashlib.sha256(made + shown.encode()).hexdigest())
    elif not cfg.corpus:
        raise InputError("this preset reads real text: give --corpus FOLDER (or tfds:NAME) and --vocab FILE")
    else:
        source = open_source(cfg.corpus)
    if cfg.vocab is not None:
        tokenizer = load_tokenizer(cfg.vocab)
    else:  # trained on the articles that the model will be trained on
        texts = texts if lang else [document.text for document in source.documents()]
        split = split_documents(len(texts), cfg.split_seed, cfg.held_out, cfg.subset_sizes)
        tokenizer = trained_wordpiece([texts[i] for i in np.sort(split.subsets[max(split.subsets)])], cfg.vocab_size)
    with Progress(None, "tokenise", "tokens", quiet=run.quiet) as progress:
        store = build_store(
            source, tokenizer, progress=lambda documents, tokens: progress.update(tokens - progress.done)
        )
    split = split_documents(store.num_documents, cfg.split_seed, cfg.held_out, cfg.subset_sizes)
    cut = partial(make_windows, store, tokenizer, length=cfg.length, mode=cfg.window)
    training = {size: cut(documents, pack=cfg.pack) for size, documents in sorted(split.subsets.items())}
    largest = training[max(training)]
    never = [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id] + [tokenizer.unk_id] * (not cfg.unknown_targets)
    frequency_V = token_frequencies(largest, np.arange(largest.num_rows), tokenizer.vocab_size)
    include_V = np.ones(tokenizer.vocab_size, bool)
    include_V[[tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]] = False
    include_V[never] = False
    description = (
        f"{store.source}: {store.num_documents:,} articles, {store.num_tokens:,} tokens "
        f"({store.unknown_share:.2%} unknown); W_S = {max(training):,} gives {largest.num_rows:,} rows of {cfg.length} "
        f"positions, {largest.dropped_documents} articles were too short; {cfg.held_out:,} articles held out"
    )
    run.say(description)
    run.keep_record("corpus", {"corpus": store.fingerprint, "vocabulary": tokenizer.sha256})
    if run.primary:
        (run.out / "checkpoints").mkdir(exist_ok=True)
        tokenizer.save(run.out / "checkpoints" / "tokenizer.json")
    masking = MaskingConfig(tokenizer.vocab_size, tokenizer.mask_id, tuple(never), cfg.slots, cfg.mask_rate)
    return Corpus(tokenizer, masking, training, cut(split.held_out), frequency_V, include_V, lang, description)


# --- pre-training and readout ----------------------------------------------------------------------------------------


def folder(run: Run, seed: int, size: int, what: str) -> Path:
    return run.out / "checkpoints" / f"seed{seed}" / f"ws{size}" / what


def batches(windows: Windows, seed: int, size: int):
    """The batch of a step, a function of the seed and the step alone."""

    def batch_at(step: int) -> dict[str, np.ndarray]:
        row_B, valid_B = rows_at(seed, step, windows.num_rows, size)
        return windows.batch(row_B, valid_B)

    return batch_at


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "file": "checkpoints/tokenizer.json"}


# The steps and the prediction are made once a process: every seed and every W_S shares one compiled program.


@cache
def lm_step(model: TransformerConfig, masking: MaskingConfig, optimizer: train.OptimizerConfig):
    loss = objectives.next_token(model) if model.causal else objectives.masked_lm(model, masking)
    return train.make_step(train.grad_of(loss), train.make_optimizer(optimizer, 1, 1))


@cache
def readout_step(model: TransformerConfig, masking: MaskingConfig, variant: str, optimizer: train.OptimizerConfig):
    return train.make_step(readout.grad_fn(model, masking, variant), train.make_optimizer(optimizer, 1, 1))


@cache
def predictor(model: TransformerConfig, masking: MaskingConfig, variant: str | None):
    return jax.jit(partial(readout.predict, cfg=model, masking=masking, variant=variant))


def finished(path: Path, kind: str, like, config: dict[str, Any], corpus: Corpus, mesh):
    """The tree of a finished checkpoint, if it is what this run would have written there."""
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
    saved = checkpoint.load(path, kind=kind, like=like, sharding=parallel.replicated(mesh))
    if saved.config != config or (saved.tokenizer or {}).get("sha256") != corpus.tokenizer.sha256:
        raise InputError(f"{path} belongs to another model or vocabulary; remove that folder or use another --out")
    return saved.tree


def pretrain(run: Run, cfg: PretrainConfig, corpus: Corpus, mesh, seed: int, size: int, variant: str = ""):
    """The trunk with its head, trained on W_S = `size`, masked or, where the model is causal, on the next token;
    snapshots at steps 0, 1, 2, 4, ... (and `cfg.snapshots` more) stay on disk. `variant` names another training of the
    same seed."""
    model, windows = cfg.model(corpus.tokenizer.vocab_size), corpus.training[size]
    per_epoch = steps_per_epoch(windows.num_rows, cfg.batch)
    steps = cfg.epochs * per_epoch
    snapshots = folder(run, seed, size, f"snapshots{variant}")
    last = checkpoint.step_path(snapshots, steps)
    if last.exists():
        like = jax.eval_shape(lambda key: transformer.init(key, model), jax.random.key(0))
        return finished(last, "transformer", like, dataclasses.asdict(model), corpus, mesh)

    stage = f"pretrain-seed{seed}-ws{size}{variant}"
    key = jax.random.fold_in(jax.random.key(seed), 0)
    params = jax.jit(transformer.init, static_argnums=1)(key, model)
    optimizer = train.OptimizerConfig(cfg.lr, cfg.weight_decay, b2=cfg.b2, schedule=cfg.schedule, warmup=cfg.warmup)
    tx = train.make_optimizer(optimizer, steps, per_epoch)
    step = lm_step(model, corpus.masking, optimizer)

    def snapshot(number, params):
        path = checkpoint.step_path(snapshots, number)
        if not path.exists():
            tokenizer = describe(corpus.tokenizer)
            checkpoint.save(
                path, params, kind="transformer", config=dataclasses.asdict(model), step=number, tokenizer=tokenizer
            )

    share = 1.0 if model.causal else min(1.0, corpus.masking.slots / cfg.length)
    state = train.fit(
        step,
        train.init_state(params, tx, jax.random.fold_in(jax.random.key(seed), 1)),
        batches(windows, seed, cfg.batch),
        train.FitConfig(steps, cfg.dispatch, cfg.checkpoint_every, train.log_spaced(steps, cfg.snapshots)),
        mesh=mesh,
        folder=folder(run, seed, size, f"state{variant}"),
        description={"stage": stage, "model": dataclasses.asdict(model)},
        on_metrics=lambda number, values: run.log(stage, number, **values),
        on_start=lambda number: run.rewind(stage, number),
        on_snapshot=snapshot,
        label=stage,
        tokens_per_step=cfg.batch * cfg.length,
        flops_per_step=cfg.batch * cfg.length * transformer.flops_per_token(model, cfg.length, share),
        peak_flops=peak_flops(run, mesh),
        quiet=run.quiet,
    )
    return state.params


def train_readouts(run: Run, cfg: AptConfig, corpus: Corpus, mesh, seed: int, size: int, trunk, trained: bool):
    """One head a depth on the frozen trunk, all in one pass over the data; masks differ from those of pre-training."""
    model, windows = cfg.model(corpus.tokenizer.vocab_size), corpus.training[size]
    heads = jax.jit(readout.init_heads, static_argnums=(1, 2))(
        jax.random.fold_in(jax.random.key(seed), 2), model, cfg.readout
    )
    if cfg.readout == "logit_lens":
        return heads
    name = f"readout-{cfg.readout}" + ("" if trained else "-untrained")
    stage = f"{name}-seed{seed}-ws{size}"
    per_epoch = steps_per_epoch(windows.num_rows, cfg.batch)
    steps = max(1, round(cfg.readout_epochs * per_epoch))
    path = folder(run, seed, size, name)
    config = {"variant": cfg.readout, "model": dataclasses.asdict(model), "trained_trunk": trained}
    if path.exists():
        return finished(path, "readout", heads, config, corpus, mesh)
    optimizer = train.OptimizerConfig(
        cfg.readout_lr, cfg.weight_decay, b2=cfg.b2, schedule=cfg.readout_schedule, warmup=cfg.warmup
    )
    tx = train.make_optimizer(optimizer, steps, per_epoch)
    state = train.fit(
        readout_step(model, corpus.masking, cfg.readout, optimizer),
        train.init_state(heads, tx, jax.random.fold_in(jax.random.key(seed), 3)),
        batches(windows, seed + 1_000_003, cfg.batch),
        train.FitConfig(steps, cfg.dispatch, cfg.checkpoint_every),
        frozen=trunk,
        mesh=mesh,
        folder=folder(run, seed, size, f"{name}-state"),
        description={"stage": stage} | config,
        on_metrics=lambda number, values: run.log(stage, number, **values),
        on_start=lambda number: run.rewind(stage, number),
        label=stage,
        tokens_per_step=cfg.batch * cfg.length,
        quiet=run.quiet,
    )
    checkpoint.save(path, state.params, kind="readout", config=config, step=steps, tokenizer=describe(corpus.tokenizer))
    return state.params


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluation_key(cfg: AptConfig, masking_pass: int) -> jax.Array:
    """The key of the masks of one pass over the held-out windows."""
    return jax.random.fold_in(jax.random.key(cfg.split_seed), 7_919 + masking_pass)


def evaluation_masking(corpus: Corpus) -> MaskingConfig:
    return dataclasses.replace(corpus.masking, rate=MaskingConfig.rate)


def evaluate(run: Run, cfg: AptConfig, corpus: Corpus, mesh, label: str, trunk, heads=None) -> dict[str, np.ndarray]:
    """Counts over the held-out windows, `passes` maskings of each, for every readout in one forward pass.

    Without `heads` the model's own head is the only readout (R = 1).

    Returns, as arrays: `hits` [R, C, V], `totals` [C, V], `group_hits` [G, R, V] and `group_totals` [G, V] over
    `count_modes`, `loss` [R] in nats, and each readout's token confusion as `row`, `col`, `count`, `start` [R + 1].
    The masks depend on the pass and the window alone: every seed and every model is asked the same questions.
    """
    model, windows = cfg.model(corpus.tokenizer.vocab_size), corpus.held_out
    V, variant = model.vocab_size, None if heads is None else cfg.readout
    R = 1 if variant is None else model.depths + 1
    predict = predictor(model, evaluation_masking(corpus), variant)
    count = jax.jit(jax.vmap(metrics.count_tokens, (None, 0, None, None, None)), static_argnums=4)
    hits, totals = np.zeros((R, len(metrics.MODES), V), np.int64), np.zeros((len(metrics.MODES), V), np.int64)
    group_hits, group_totals = np.zeros((GROUPS, R, V), np.int32), np.zeros((GROUPS, V), np.int32)
    counted_C = np.array([mode in cfg.count_modes for mode in metrics.MODES])
    loss_R, overflow, parts = np.zeros(R), 0, []
    # A group is a contiguous stretch of articles; batches do not straddle groups, so a batch's counts are its group's.
    documents = windows.document_W
    order = {document: number for number, document in enumerate(dict.fromkeys(documents.tolist()))}
    group_W = np.array([order[document] * GROUPS // len(order) for document in documents.tolist()])
    B = cfg.batch
    with Progress(windows.num_rows * cfg.passes, f"evaluate {label}", "rows", quiet=run.quiet) as progress:
        for masking_pass in range(cfg.passes):
            key = evaluation_key(cfg, masking_pass)
            for group in range(GROUPS):
                rows = np.flatnonzero(group_W == group)
                for begin in range(0, len(rows), B):
                    row_B = np.zeros(B, np.int64)
                    taken = rows[begin : begin + B]
                    row_B[: len(taken)] = taken
                    batch = windows.batch(row_B, np.arange(B) < len(taken))
                    batch = jax.tree.map(
                        lambda x: x[0], parallel.put_batches(jax.tree.map(lambda x: x[None], batch), mesh)
                    )
                    prediction_RBK, nll_RB, corrupted = predict(trunk, heads, batch, key)
                    counts = count(corrupted.target_BK, prediction_RBK, corrupted.mode_BK, corrupted.valid_BK, V)
                    counts, nll_RB, now, prediction_RBK = jax.device_get((counts, nll_RB, corrupted, prediction_RBK))
                    hits += counts.hits_CV
                    totals += counts.totals_CV[0]
                    group_hits[group] += counts.hits_CV[:, counted_C].sum(1)
                    group_totals[group] += counts.totals_CV[0, counted_C].sum(0)
                    loss_R += nll_RB.sum(-1)
                    overflow += int(now.overflow_B.sum())
                    use_BK = now.valid_BK & counted_C[now.mode_BK]
                    parts.append((now.target_BK[use_BK], prediction_RBK[:, use_BK]))
                    progress.update(len(taken))
    target_X = np.concatenate([target for target, _ in parts])
    prediction_RX = np.concatenate([prediction for _, prediction in parts], axis=1)
    confusions = [metrics.count_confusion(target_X, p, np.ones(p.shape, bool), V) for p in prediction_RX]
    positions = int(totals.sum())
    return {
        "hits": hits.astype(np.int32),
        "totals": totals.astype(np.int32),
        "group_hits": group_hits,
        "group_totals": group_totals,
        "loss": loss_R / max(positions, 1),
        "row": np.concatenate([np.asarray(c.row_E) for c in confusions]),
        "col": np.concatenate([np.asarray(c.col_E) for c in confusions]),
        "count": np.concatenate([np.asarray(c.count_E) for c in confusions]),
        "start": np.cumsum([0] + [len(c.row_E) for c in confusions]),
        "overflow": np.int64(overflow),
    }


# --- results ---------------------------------------------------------------------------------------------------------


class Curves(NamedTuple):
    """Numbers of one evaluated model, by readout [R]."""

    apt_R: np.ndarray
    tokens_R: np.ndarray  # T
    top50_R: np.ndarray
    min50_R: np.ndarray
    micro_R: np.ndarray
    loss_R: np.ndarray
    by_mode_CR: np.ndarray
    influence_RG: np.ndarray  # of each group of held-out articles on <APT>, paired across models


def token_counts(result, r: int) -> metrics.TokenCounts:
    return metrics.TokenCounts(jnp.asarray(result["hits"][r]), jnp.asarray(result["totals"]))


def curves(result, cfg: AptConfig, corpus: Corpus) -> Curves:
    include_V, modes = jnp.asarray(corpus.include_V), tuple(cfg.count_modes)
    frequency_V = jnp.asarray(np.minimum(corpus.frequency_V, 2**31 - 1), jnp.int32)
    columns: dict[str, list] = {name: [] for name in ("apt", "tokens", "top50", "min50", "micro", "modes", "influence")}
    for r in range(len(result["loss"])):
        counts = token_counts(result, r)
        mean, tokens = metrics.macro_apt(counts, include_V, cfg.min_count, modes)
        columns["apt"].append(mean)
        columns["tokens"].append(tokens)
        columns["top50"].append(metrics.apt_top50(counts, include_V, frequency_V, 50, modes).mean)
        columns["min50"].append(metrics.apt_min50(counts, include_V, modes).mean)
        columns["micro"].append(metrics.micro_accuracy(counts, include_V, modes))
        columns["modes"].append([metrics.macro_apt(counts, include_V, cfg.min_count, (m,)).mean for m in metrics.MODES])
        columns["influence"].append(
            metrics.macro_apt_influence(result["group_hits"][:, r], result["group_totals"], include_V, cfg.min_count)
        )
    apt, tokens, top50, min50, micro, modes, influence = (np.asarray(jax.device_get(x)) for x in columns.values())
    return Curves(apt, tokens, top50, min50, micro, result["loss"], modes.T, influence)


def group_interval(value: float, influence_G) -> tuple[float, float]:
    """95 % interval of a single seed from the influence of each group of articles (t distribution, G - 1)."""
    from scipy.special import stdtrit

    half = float(stdtrit(GROUPS - 1, 0.975) * np.sqrt(GROUPS / (GROUPS - 1) * np.square(influence_G).sum()))
    return float(value) - half, float(value) + half


def spread(values_S, influence_G) -> tuple[float, tuple[float, float]]:
    """Mean and 95 % interval: over seeds when there are several, else over groups of articles."""
    if len(values_S) > 1:
        return claims.mean_interval(values_S)
    return float(values_S[0]), group_interval(values_S[0], influence_G)


def frequency_bins(frequency_V: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Two bins a decade: the bin of every id, int32 [V], and the bounds `[low, high)` of each."""
    edges = [0, 1]
    while edges[-1] <= frequency_V.max():
        edges += [edges[-1] * 10 // 3 if edges[-1] > 1 else 3, 10 ** len(str(edges[-1]))]
    edges = sorted({e for e in edges})
    bin_V = np.searchsorted(edges, frequency_V, side="right").astype(np.int32) - 1
    used = int(bin_V.max()) + 1
    return bin_V, list(zip(edges[:used], edges[1 : used + 1], strict=True))


def confusion(result, r: int) -> metrics.Confusion:
    part = slice(int(result["start"][r]), int(result["start"][r + 1]))
    return metrics.Confusion(result["row"][part], result["col"][part], result["count"][part], np.int32(0))


def shuffled_errors(matrix: metrics.Confusion, bin_V: np.ndarray, seed: int) -> metrics.Confusion:
    """The null of the clusters: ids keep their hits, but wrong answers change places within each frequency bin (the few
    that would become right are dropped)."""
    row, col = (np.repeat(x, matrix.count_E) for x in (matrix.row_E, matrix.col_E))
    right = row == col
    wrong_row, wrong_col = row[~right], col[~right]
    generator = np.random.Generator(np.random.Philox(key=seed))
    bins = bin_V[wrong_row]
    shuffled = np.empty_like(wrong_col)
    shuffled[np.argsort(bins, kind="stable")] = wrong_col[np.lexsort((generator.random(bins.size), bins))]
    still_wrong = shuffled != wrong_row
    row = np.concatenate([row[right], wrong_row[still_wrong]])
    col = np.concatenate([col[right], shuffled[still_wrong]])
    return metrics.count_confusion(row, col, np.ones(row.shape, bool), bin_V.size)


class Clustering(NamedTuple):
    """Clusters of one readout at theta, and the statistics of the sweep."""

    label_V: np.ndarray
    kept_V: np.ndarray
    mutual: metrics.ClusterStats  # leading axis P
    either: metrics.ClusterStats  # OR graph, leading axis P


def cluster(matrix: metrics.Confusion, cfg: AptConfig, vocab_size: int, n_min: int) -> Clustering:
    thetas = cfg.sweep
    matches = metrics.strong_matches(matrix, vocab_size, thetas[0], n_min)
    theta_P = jnp.asarray(thetas, jnp.float32)
    label_PV, mutual = metrics.threshold_sweep(matches, theta_P)
    _, either = metrics.threshold_sweep(matches, theta_P, mutual=False)
    return Clustering(
        np.asarray(label_PV[thetas.index(cfg.theta)]), np.asarray(matches.kept_V), *jax.device_get((mutual, either))
    )


def clustered_share(clustering: Clustering, at: int) -> float:
    """Share of the kept ids that are in a cluster of two or more."""
    kept = int(clustering.mutual.kept[at])
    return 1.0 - int(clustering.mutual.singletons[at]) / kept if kept else 0.0


class Study(NamedTuple):
    """All that was measured; lists run over seeds."""

    main: list[dict[str, Any]]  # evaluation of the trunk of the largest W_S, all readouts
    curves: list[Curves]
    control: list[Curves]  # untrained trunk with trained readouts; empty without that control
    by_size: dict[int, list[Curves]]  # own head of every W_S
    clusters: list[list[Clustering]]  # [seed][readout]
    clusters_10: list[list[Clustering]]  # the same among ids with at least 10 hits
    null: list[Clustering]  # last block, errors shuffled within frequency bins
    bin_V: np.ndarray
    bins: list[tuple[int, int]]


def study(run: Run, cfg: AptConfig, corpus: Corpus, mesh) -> Study:
    """Every stage of every seed: pre-train each W_S, read the largest at every depth, evaluate."""
    V, largest = corpus.tokenizer.vocab_size, max(cfg.subset_sizes)
    main, control, by_size = [], [], {size: [] for size in sorted(cfg.subset_sizes)}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for size in sorted(cfg.subset_sizes):
            trunk = pretrain(run, cfg, corpus, mesh, seed, size)
            if size != largest:
                name = f"evaluate-seed{seed}-ws{size}"
                by_size[size].append(run.stage(name, partial(evaluate, run, cfg, corpus, mesh, name, trunk)))
        for trained in (True, False) if cfg.untrained_control else (True,):
            if not trained:
                trunk = jax.jit(transformer.init, static_argnums=1)(
                    jax.random.fold_in(jax.random.key(seed), 0), cfg.model(V)
                )
            heads = train_readouts(run, cfg, corpus, mesh, seed, largest, trunk, trained)
            name = f"evaluate-seed{seed}-ws{largest}" + ("" if trained else "-untrained")
            result = run.stage(name, partial(evaluate, run, cfg, corpus, mesh, name, trunk, heads))
            (main if trained else control).append(result)
    run.say("clusters, intervals")
    M = cfg.blocks + 1
    bin_V, bins = frequency_bins(corpus.frequency_V)
    own = [
        {**result, "hits": result["hits"][M:], "group_hits": result["group_hits"][:, M:], "loss": result["loss"][M:]}
        for result in main
    ]
    by_size[largest] = own
    return Study(
        main,
        [curves(result, cfg, corpus) for result in main],
        [curves(result, cfg, corpus) for result in control],
        {size: [curves(result, cfg, corpus) for result in results] for size, results in by_size.items()},
        [[cluster(confusion(result, r), cfg, V, cfg.n_min) for r in range(M + 1)] for result in main],
        [[cluster(confusion(result, r), cfg, V, 10) for r in range(M + 1)] for result in main],
        [cluster(shuffled_errors(confusion(result, M - 1), bin_V, 0), cfg, V, cfg.n_min) for result in main],
        bin_V,
        bins,
    )


def apt_by_bin(cfg: AptConfig, corpus: Corpus, found: Study, m: int) -> list[metrics.MacroApt]:
    """Mean APT at depth m in each frequency bin [Q], one entry a seed."""
    include_V, bin_V = jnp.asarray(corpus.include_V), jnp.asarray(found.bin_V)
    return [
        metrics.apt_by_bin(
            token_counts(result, m), include_V, bin_V, len(found.bins), cfg.min_count, tuple(cfg.count_modes)
        )
        for result in found.main
    ]


# --- claims: every rule below was written before the runs of RESULTS.md --------------------------------------------


def half_of_rarer_ids(corpus: Corpus, result) -> np.ndarray:
    """bin_V of two bins, 0 the less frequent half of the ids that were asked for, 1 the other."""
    asked = np.flatnonzero(corpus.include_V & (result["totals"].sum(0) > 0))
    order = asked[np.argsort(corpus.frequency_V[asked], kind="stable")]
    half_V = np.ones(corpus.include_V.size, np.int32)
    half_V[order[: len(order) // 2]] = 0
    return half_V


def no_context_bound(cfg: AptConfig, found: Study) -> float | None:
    """The most that <APT> of block 0 can be; None when only some corruption modes count, or no id does."""
    tokens = int(found.curves[0].tokens_R[0])
    if set(cfg.count_modes) != set(metrics.MODES) or not tokens:
        return None
    return metrics.context_free_bound(tokens, cfg.length)


def rank_correlation(corpus: Corpus, hits_V, totals_V) -> float:
    """Spearman correlation of APT with training frequency over ids with n_i >= 10."""
    from scipy import stats

    use = corpus.include_V & (totals_V >= 10)
    if use.sum() < 3 or np.ptp(hits_V[use]) == 0:
        return float("nan")
    return float(stats.spearmanr(hits_V[use] / totals_V[use], corpus.frequency_V[use]).statistic)


def judge(cfg: AptConfig, corpus: Corpus, found: Study, limit: Limit | None) -> list[Claim]:
    """The claims of the paper that pre-training can test, then the checks of the instrument itself."""
    M, L, several = cfg.blocks + 1, cfg.blocks, cfg.seeds > 1
    curves_S = found.curves
    at = cfg.sweep.index(cfg.theta)
    judged: list[Claim] = []

    def add(name, where, statement, expected, outcome):
        judged.append(Claim(name, f"arXiv {PAPER}, {where}", statement, expected, *outcome))

    def by_groups(value, influence_G):
        """The interval of a single seed; several seeds make their own."""
        return None if several else group_interval(value, influence_G)

    last = [c.apt_R[L] for c in curves_S]
    first = [c.apt_R[0] for c in curves_S]
    d_last_G, d_first_G = curves_S[0].influence_RG[L], curves_S[0].influence_RG[0]
    rank = []
    for result in found.main:
        hits_GV, totals_GV = result["group_hits"][:, L], result["group_totals"]
        rank.append(rank_correlation(corpus, hits_GV.sum(0), totals_GV.sum(0)))
    without_G = np.array([  # delete-one-group jackknife of the first seed
        rank_correlation(corpus, np.delete(hits, g, 0).sum(0), np.delete(totals, g, 0).sum(0))
        for hits, totals in [(found.main[0]["group_hits"][:, L], found.main[0]["group_totals"])]
        for g in range(GROUPS)
    ])  # fmt: skip
    d_rank_G = (GROUPS - 1) / GROUPS * (without_G.mean() - without_G)
    add(
        "apt-frequency", "Fig. 1", "APT grows with the token's frequency (rank correlation, last block, n_i >= 10)",
        "positive", claims.greater_than(rank, 0.0, by_groups(rank[0], d_rank_G)),
    )  # fmt: skip
    rise = claims.increasing([c.apt_R[:M] for c in curves_S])
    if not several:
        gain = claims.greater_than([last[0] - first[0]], 0.0, by_groups(last[0] - first[0], d_last_G - d_first_G))
        kept = gain.verdict != claims.SUPPORTED or rise.verdict == claims.SUPPORTED
        rise = gain._replace(
            verdict=gain.verdict if kept else claims.NOT_SUPPORTED, rule=f"{gain.rule}; and {rise.rule}"
        )
    add("apt-blocks", "Table 1", "<APT> rises along the blocks (last block minus block 0)", "rises", rise)
    factor = [b / a if a > 0 else np.nan for a, b in zip(first, last, strict=True)]
    relative_G = d_last_G / max(last[0], 1e-12) - d_first_G / max(first[0], 1e-12)
    add(
        "apt-blocks-factor", "Table 1 (0.31 / 0.037 = 8.4 there, W_S unknown)",
        "<APT> of the last block is at least 3 times that of block 0", "at least 3 (ours)",
        claims.greater_than(factor, 3.0, by_groups(factor[0], factor[0] * relative_G)),
    )  # fmt: skip
    if len(cfg.subset_sizes) > 1:
        sizes = sorted(cfg.subset_sizes)
        values_SX = np.array([[found.by_size[size][s].apt_R[0] for size in sizes] for s in range(cfg.seeds)])
        outcome = claims.increasing(values_SX)
    else:
        outcome = claims.not_tested("needs several --subset-sizes")
    add("apt-subset", "Fig. 2", "<APT> of the last block rises with W_S, the articles trained on", "rises", outcome)
    all_modes = set(cfg.count_modes) == set(metrics.MODES)
    partial_modes = claims.not_tested(
        "its bound holds for all corruption modes together; drop --count-modes", cfg.seeds
    )
    shares = []
    for result in found.main:
        halves = metrics.rise_by_bin(
            token_counts(result, 0), token_counts(result, L), jnp.asarray(corpus.include_V),
            jnp.asarray(half_of_rarer_ids(corpus, result)), 2, cfg.min_count,
        )  # fmt: skip
        whole = float(halves.rise_Q.sum())
        shares.append(float(halves.rise_Q[0]) / whole if whole > 0 else np.nan)
    outcome = claims.greater_than(shares, 0.5) if all_modes else partial_modes
    if not np.isfinite(shares).all():
        outcome = claims.not_tested("<APT> does not rise, so nobody carries the rise", cfg.seeds)
    add(
        "rare-tokens", "Table 1", "The less frequent half of the tokens carries more of the rise of <APT> along blocks",
        "share above 0.5", outcome,
    )  # fmt: skip
    clustered = all(int(c[L].mutual.max_size[at]) > 1 and int(c[L].mutual.kept[at]) >= 10 for c in found.clusters)
    giant = [float(c[L].mutual.giant_fraction[at]) for c in found.clusters]
    none = claims.not_tested("needs 10 tokens that pass the filter and a cluster of two at the last block", cfg.seeds)
    add(
        "clusters-small", "clusters of strong matches",
        f"Clusters stay small: the largest holds under 10 % of the kept tokens (theta {cfg.theta:g}, last block)",
        "below 0.1 (ours)", claims.less_than(giant, 0.1) if clustered else none,
    )  # fmt: skip
    strong = [[int(b.mutual.strong[at]) for b in (c[1], c[L])] for c in found.clusters]
    noise = [[int(b.mutual.noise[at]) / max(int(b.mutual.strong[at]), 1) for b in (c[1], c[L])] for c in found.clusters]
    add(
        "clusters-sharper", "clusters of strong matches",
        "Clusters are sharper in later blocks: fewer strong matches lie outside clusters at the last than at block 1",
        "below 0",
        claims.less_than([late - early for early, late in noise], 0.0)
        if np.min(strong) > 0 and clustered
        else none._replace(rule=f"{none.rule}, and strong matches at block 1"),
    )  # fmt: skip
    real = [clustered_share(c[L], at) - clustered_share(n, at) for c, n in zip(found.clusters, found.null, strict=True)]
    add(
        "clusters-null", "control (ours)",
        "More tokens are clustered than when errors are shuffled within frequency bins (difference of shares)",
        "positive", claims.greater_than(real, 0.0) if clustered else none,
    )  # fmt: skip
    if found.control:
        gains = [c.apt_R[L] - u.apt_R[L] for c, u in zip(curves_S, found.control, strict=True)]
        add(
            "untrained-trunk", "control (ours)",
            "It is pre-training and not the readout: trained minus untrained trunk, <APT> of the last block",
            "positive",
            claims.greater_than(gains, 0.0, by_groups(gains[0], d_last_G - found.control[0].influence_RG[L])),
        )  # fmt: skip
    bound = no_context_bound(cfg, found)
    add(
        "block-0-bound", "check (sheet, 5.1)", "Block 0 sees no context: its <APT> stays below the context-free bound",
        None if bound is None else round(bound, 4),
        partial_modes if bound is None else claims.less_than(first, bound, by_groups(first[0], d_first_G)),
    )  # fmt: skip
    if limit is not None:
        ids = np.flatnonzero(limit.class_V >= 0)
        scores = [metrics.adjusted_rand_index(c[L].label_V[ids], limit.class_V[ids]) for c in found.clusters]
        add(
            "planted-classes", "embedded corpus (ours)",
            "The clusters of the last block are the planted token classes (adjusted Rand index)",
            "at least 0.8", claims.greater_than(scores, 0.8),
        )  # fmt: skip
        ratio = [value / limit.apt for value in last]
        add(
            "bayes-limit", "embedded corpus (ours)",
            "<APT> of the last block as a share of the Bayes predictor's: near 1 and not clearly above it",
            "0.5 to 1.05", claims.within(ratio, 0.5, 1.05) if all_modes else partial_modes,
        )  # fmt: skip
    return judged


class Limit(NamedTuple):
    """What is known of the embedded corpus: the planted class of each id (-1: none) and the best <APT> there can be."""

    class_V: np.ndarray
    apt: float  # <APT> of the Bayes predictor (most probable token)
    apt_bound: float  # the most that <APT> can be for any predictor
    micro: float


def planted_truth(run: Run, cfg: AptConfig, corpus: Corpus) -> Limit:
    """The planted class of every id, and what the generator itself would answer to the evaluation's own corruptions."""
    table_V = language.word_ids(corpus.lang, {token: i for i, token in enumerate(corpus.tokenizer.tokens)})
    class_V = np.where(table_V >= 0, corpus.lang.class_W[np.maximum(table_V, 0)], -1)

    def compute():
        _, rows = np.unique(corpus.held_out.document_W, return_index=True)  # the posterior is that of first windows
        batch = corpus.held_out.batch(rows)
        corrupted, _ = jax.jit(objectives.masked_batch, static_argnums=2)(
            batch, evaluation_key(cfg, 0), evaluation_masking(corpus)
        )
        ids_BT, slot_BK, valid_BK = (np.asarray(x) for x in (corrupted.ids_BT, corrupted.slot_BK, corrupted.valid_BK))
        modified_BT = np.zeros(ids_BT.shape, bool)
        modified_BT[np.nonzero(valid_BK)[0], slot_BK[valid_BK]] = True
        length_B = (batch["segment"] > 0).sum(1) - 2
        inner = slice(1, cfg.length - 1)  # the row without [CLS]; [SEP] lies behind `length_B`
        found = language.bayes_apt_of(
            corpus.lang,
            table_V[ids_BT[:, inner]],
            length_B,
            modified_BT[:, inner],
            language.Corruption(corpus.tokenizer.vocab_size),
        )
        return {"apt": found.macro, "apt_bound": found.best, "micro": found.micro}

    found = run.stage("bayes", compute)
    return Limit(class_V, *(float(found[name]) for name in ("apt", "apt_bound", "micro")))


# --- tables and figures ----------------------------------------------------------------------------------------------


def write_tables(run: Run, cfg: AptConfig, corpus: Corpus, found: Study, limit: Limit | None) -> None:
    M, seeds = cfg.blocks + 1, range(cfg.seeds)
    paper_values = {0: 0.037, 6: 0.31} if cfg.blocks == 6 else {}

    def mean(values):
        return float(np.mean(values))

    def block_row(curves_S: list[Curves], r: int, block: int, head: str, trunk: str) -> dict:
        apt, interval = spread([c.apt_R[r] for c in curves_S], curves_S[0].influence_RG[r])
        modes = {f"apt_{mode}": mean([c.by_mode_CR[i, r] for c in curves_S]) for i, mode in enumerate(metrics.MODES)}
        return {
            "block": block,
            "apt_mean": apt,
            "apt_top50": mean([c.top50_R[r] for c in curves_S]),
            "apt_min50": mean([c.min50_R[r] for c in curves_S]),
            "micro_accuracy": mean([c.micro_R[r] for c in curves_S]),
            "loss": mean([c.loss_R[r] for c in curves_S]),
            "tokens": int(curves_S[0].tokens_R[r]),
            "apt_low": interval[0],
            "apt_high": interval[1],
            **modes,
            "head": head,
            "trunk": trunk,
            "paper_apt_mean": paper_values.get(block) if trunk == "pre-trained" else None,
        }

    rows = [block_row(found.curves, m, m, cfg.readout, "pre-trained") for m in range(M)]
    rows.append(block_row(found.curves, M, cfg.blocks, "original", "pre-trained"))
    if found.control:
        rows += [block_row(found.control, m, m, cfg.readout, "untrained") for m in range(M)]
    counted = ", ".join(cfg.count_modes)
    run.table(
        "apt_by_block", rows,
        f"Accuracy per token by block, mean over {cfg.seeds} seed(s); apt_low and apt_high: 95 % interval over "
        f"{'seeds' if cfg.seeds > 1 else 'groups of held-out articles'}. Modified positions counted: {counted}; "
        f"tokens: the T ids with at least {cfg.min_count} of them; loss: nats, all modes. "
        "The paper's values belong to an unpublished W_S.",
    )  # fmt: skip

    rows = []
    for m in range(M):
        bins = apt_by_bin(cfg, corpus, found, m)
        for q, (low, high) in enumerate(found.bins):
            if int(bins[0].tokens[q]):
                apt = mean([float(b.mean[q]) for b in bins])
                rows.append(
                    {
                        "block": m,
                        "frequency_from": low,
                        "frequency_below": high,
                        "tokens": int(bins[0].tokens[q]),
                        "apt_mean": apt,
                    }
                )
    run.table("apt_by_frequency", rows, "Mean APT of the ids in each bin of training frequency, by block.")

    rows = []
    for size in sorted(cfg.subset_sizes):
        curves_S = found.by_size[size]
        apt, (low, high) = spread([c.apt_R[0] for c in curves_S], curves_S[0].influence_RG[0])
        windows = corpus.training[size]
        rows.append({
            "subset": size, "rows": windows.num_rows,
            "steps": cfg.epochs * steps_per_epoch(windows.num_rows, cfg.batch),
            "apt_mean": apt, "apt_low": low, "apt_high": high, "apt_top50": mean([c.top50_R[0] for c in curves_S]),
            "micro_accuracy": mean([c.micro_R[0] for c in curves_S]), "loss": mean([c.loss_R[0] for c in curves_S]),
        })  # fmt: skip
    run.table("apt_by_subset", rows, f"Last block, original head, by W_S; every W_S is passed over {cfg.epochs} times.")

    rows, tokens = [], corpus.tokenizer.tokens
    seen_V = found.main[0]["group_totals"].sum(0)
    for number, members in enumerate(members_of(found.clusters[0][cfg.blocks])):
        row = {"cluster": number, "size": len(members), "occurrences": int(seen_V[members].sum())}
        row["tokens"] = " ".join(tokens[i] for i in members)
        if limit is not None:
            planted = limit.class_V[members]
            row["planted_class"] = int(planted[0]) if len(set(planted.tolist())) == 1 else None
        rows.append(row)
    empty = {"cluster": [], "size": [], "occurrences": [], "tokens": []}
    run.table(
        "clusters", rows or empty,
        f"Clusters of two or more at the last block, seed {cfg.seed}: mutual strong matches, theta {cfg.theta:g}, "
        f"largest first; n_min {cfg.n_min}.",
    )  # fmt: skip

    rows = []
    sources = [(cfg.n_min, found.clusters), (10, found.clusters_10)]
    for n_min, clusters_S in sources:
        for r in range(M + 1):
            for graph in ("mutual", "either"):
                for p, theta in enumerate(cfg.sweep):
                    stats = [getattr(clusters_S[s][r], graph) for s in seeds]
                    names = (
                        "kept",
                        "components",
                        "singletons",
                        "mean_size",
                        "max_size",
                        "giant_fraction",
                        "strong",
                        "noise",
                    )
                    values = {name: mean([float(getattr(stat, name)[p]) for stat in stats]) for name in names}
                    head = {"block": min(r, cfg.blocks), "head": cfg.readout if r < M else "original"}
                    rows.append(head | {"n_min": n_min, "graph": graph, "theta": theta} | values)
    run.table("cluster_stats", rows, "Statistics of the clusters by block, graph and threshold, mean over seeds.")
    histogram = [
        {"block": min(r, cfg.blocks), "head": cfg.readout if r < M else "original", "size": size, "clusters": int(n)}
        for r in range(M + 1)
        for size, n in enumerate(found.clusters[0][r].mutual.histogram[cfg.sweep.index(cfg.theta)])
        if size and n
    ]
    run.table(
        "cluster_sizes", histogram or {"block": [], "head": [], "size": [], "clusters": []},
        f"How many clusters have which size, seed {cfg.seed}, mutual graph, theta {cfg.theta:g}.",
    )  # fmt: skip


def members_of(clustering: Clustering) -> list[np.ndarray]:
    """The ids of every cluster of two or more, largest cluster first, lowest id first among equals."""
    kept = np.flatnonzero(clustering.kept_V)
    label = clustering.label_V[kept]
    groups = np.split(kept[np.argsort(label, kind="stable")], np.flatnonzero(np.diff(np.sort(label))) + 1)
    return sorted((g for g in groups if len(g) > 1), key=lambda g: (-len(g), g[0]))


@figures.style()
def draw(run: Run, cfg: AptConfig, corpus: Corpus, found: Study, limit: Limit | None) -> None:
    M, blocks = cfg.blocks + 1, np.arange(cfg.blocks + 1)
    over = "seeds" if cfg.seeds > 1 else "groups of held-out articles"

    def band(curves_S, r):
        mean, (low, high) = spread([c.apt_R[r] for c in curves_S], curves_S[0].influence_RG[r])
        return mean, low, high

    fig, (ax, right) = figures.new(1, 2, height=3.4)
    mean, low, high = np.array([band(found.curves, m) for m in range(M)]).T
    figures.line(ax, blocks, mean, low=low, high=high, label="<APT>")
    figures.line(
        ax,
        [cfg.blocks],
        [np.mean([c.apt_R[M] for c in found.curves])],
        label="<APT>, original head",
        marker="D",
        linestyle="none",
    )
    if found.control:
        mean, low, high = np.array([band(found.control, m) for m in range(M)]).T
        figures.line(ax, blocks, mean, low=low, high=high, label="untrained trunk", linestyle="--")
    bound = no_context_bound(cfg, found)
    if bound is not None:
        ax.axhline(bound, color="#777777", linestyle=":", label="bound without context")
    if limit is not None:
        ax.axhline(limit.apt, color="#000000", linestyle="-.", linewidth=1, label="Bayes predictor")
    ax.set(
        xlabel="block (0: embedding)", ylabel="mean accuracy per token", title="<APT> along the blocks", ylim=(0, None)
    )
    ax.legend()
    for name, values in (
        ("50 most frequent", [c.top50_R[:M] for c in found.curves]),
        ("n >= 50", [c.min50_R[:M] for c in found.curves]),
        ("micro accuracy", [c.micro_R[:M] for c in found.curves]),
    ):
        figures.line(right, blocks, np.mean(values, axis=0), label=name)
    right.set(xlabel="block (0: embedding)", ylabel="accuracy", title="APT(50) and micro accuracy", ylim=(0, None))
    right.legend()
    run.figure(
        "apt_by_block", fig, alt="Mean accuracy per token against block, with APT(50) and micro accuracy beside it",
        caption=f"<APT>, its mean over tokens, and APT(50) in both readings, along the blocks ({cfg.readout} readout, "
        f"W_S = {max(cfg.subset_sizes):,}). Bands: 95 % interval over {over}.",
    )  # fmt: skip

    fig, ax = figures.new()
    centre = [max(low, 0.5) * (max(high, 1) / max(low, 0.5)) ** 0.5 for low, high in found.bins]
    for m, colour in zip(range(M), figures.shades(M), strict=True):
        bins = apt_by_bin(cfg, corpus, found, m)
        figures.line(ax, centre, np.mean([np.asarray(b.mean) for b in bins], axis=0), label=f"block {m}", color=colour)
    ax.set(xscale="log", xlabel="occurrences in the training subset", ylabel="mean APT of the bin", ylim=(0, None))
    ax.set_title("Accuracy per token against frequency")
    ax.legend()
    run.figure(
        "apt_by_frequency", fig, alt="Mean accuracy per token against training frequency, one line a block",
        caption="APT against the token's frequency in the training subset, two bins a decade, one line a block.",
    )  # fmt: skip

    if len(cfg.subset_sizes) > 1:
        fig, ax = figures.new()
        sizes = sorted(cfg.subset_sizes)
        mean, low, high = np.array([band(found.by_size[size], 0) for size in sizes]).T
        figures.line(ax, sizes, mean, low=low, high=high)
        ax.set(xscale="log", xlabel="W_S, training articles", ylabel="<APT>, last block, original head", ylim=(0, None))
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        ax.minorticks_off()
        ax.set_title("<APT> against the size of the training subset")
        run.figure(
            "apt_by_subset", fig, alt="Mean accuracy per token of the last block against W_S",
            caption=f"<APT> of the last block against W_S, {cfg.epochs} passes over each subset. "
            f"Band: 95 % interval over {over}.",
        )  # fmt: skip

    draw_confusion(run, cfg, corpus, found)

    fig, axes = figures.new(1, 3, height=3.2)
    thetas = cfg.sweep
    for ax, (title, value) in zip(
        axes,
        (
            ("clusters of two or more", lambda s: np.asarray(s.components, float) - s.singletons),
            ("mean size of those", lambda s: (s.kept - s.singletons) / np.maximum(s.components - s.singletons, 1)),
            ("largest / kept tokens", lambda s: np.asarray(s.giant_fraction, float)),
        ),
        strict=True,
    ):
        table_MP = [np.mean([value(c[m].mutual) for c in found.clusters], axis=0) for m in range(M)]
        figures.heatmap(ax, np.array(table_MP).T, rows=[f"{t:g}" for t in thetas], cols=[str(m) for m in range(M)])
        ax.tick_params(axis="x", rotation=0)
        ax.set(xlabel="block", title=title)
    axes[0].set_ylabel("threshold theta")
    run.figure(
        "cluster_sizes", fig, alt="Heat maps of number, mean size and largest share of clusters by block and threshold",
        caption="Clusters of mutual strong matches by block and threshold: how many, how large, and the largest one's "
        "share of the tokens that pass the filter.",
    )  # fmt: skip


@figures.style()
def draw_confusion(run: Run, cfg: AptConfig, corpus: Corpus, found: Study, shown: int = 40) -> None:
    """R_ij of the largest clusters of the last block, tokens side by side."""
    picked: list[int] = []
    edges = []
    for members in members_of(found.clusters[0][cfg.blocks]):
        if len(picked) + min(len(members), 12) > shown:
            break
        picked += members[:12].tolist()
        edges.append(len(picked))
    if len(picked) < 2:
        run.say("no cluster of two or more tokens at the last block: no confusion picture")
        return
    matrix = confusion(found.main[0], cfg.blocks)
    place = np.full(corpus.tokenizer.vocab_size, -1)
    place[picked] = np.arange(len(picked))
    inside = (place[matrix.row_E] >= 0) & (place[matrix.col_E] >= 0)
    ratio = np.zeros((len(picked), len(picked)))
    ratio[place[matrix.row_E[inside]], place[matrix.col_E[inside]]] = matrix.count_E[inside]
    ratio /= np.maximum(np.diag(ratio), 1)[:, None]
    fig, ax = figures.new(height=6.4)
    names = [corpus.tokenizer.tokens[i] for i in picked]
    figures.heatmap(ax, ratio, rows=names, cols=names, label="R_ij = M_ij / M_ii", vmin=0, vmax=1, aspect="equal")
    for edge in edges[:-1]:
        ax.axhline(edge - 0.5, color="white", linewidth=0.8)
        ax.axvline(edge - 0.5, color="white", linewidth=0.8)
    ax.tick_params(labelsize=7)
    ax.set(xlabel="predicted token", ylabel="true token", title="Token confusion of the largest clusters, last block")
    run.figure(
        "confusion", fig, alt="Heat map of the token confusion matrix restricted to the largest clusters",
        caption=f"Normalised token confusion of the largest clusters at the last block (theta {cfg.theta:g}), lines "
        "between clusters: bright squares are tokens that the model takes for one another.",
    )  # fmt: skip


# --- main ------------------------------------------------------------------------------------------------------------


def mesh_for(batch: int):
    """All devices that divide the batch."""
    return parallel.make_mesh(next(n for n in range(jax.device_count(), 0, -1) if batch % n == 0))


def fine_tuning(run: Run, cfg: AptConfig, corpus: Corpus, found: Study) -> apt_finetune.Setting:
    """What the fine-tuning stages need of all this."""
    mesh = mesh_for(cfg.finetune_batch)
    model = cfg.model(corpus.tokenizer.vocab_size)
    like = jax.eval_shape(lambda key: transformer.init(key, model), jax.random.key(0))
    steps = {
        size: cfg.epochs * steps_per_epoch(windows.num_rows, cfg.batch) for size, windows in corpus.training.items()
    }

    def trunk_at(seed: int, size: int, step: int):
        path = checkpoint.step_path(folder(run, cfg.seed + seed, size, "snapshots"), step)
        return finished(path, "transformer", like, dataclasses.asdict(model), corpus, mesh)

    own = cfg.blocks + 1  # the model itself, with its own head: readouts of the last block may be less trained

    def apt_of(result):
        counts = token_counts(result, own)
        apt_V = np.array(metrics.apt(counts, tuple(cfg.count_modes)))
        return np.where(corpus.include_V, apt_V, np.nan)

    return apt_finetune.Setting(
        model=model,
        tokenizer=corpus.tokenizer,
        tokenizer_record=describe(corpus.tokenizer),
        mesh=mesh,
        seeds=cfg.seeds,
        sizes=steps,
        trunk_at=trunk_at,
        apt_SV=np.stack([apt_of(result) for result in found.main]),
        count_SV=np.stack([result["group_totals"].sum(0) for result in found.main]),
        matches_S=[
            metrics.strong_matches(confusion(result, own), corpus.tokenizer.vocab_size, cfg.theta, cfg.n_min)
            for result in found.main
        ],
        own_apt={
            (size, steps[size]): float(np.mean([c.apt_R[0] for c in curves_S]))
            for size, curves_S in found.by_size.items()
        },
        frequency_V=corpus.frequency_V,
        special=tuple(corpus.tokenizer.special_ids),
        checkpoint_every=cfg.checkpoint_every,
    )


def run_apt(run: Run, cfg: AptConfig) -> None:
    cfg.model(vocab_size=100)  # settings that cannot be are told before the text is read
    lang = language.make_language(DEMO_LANGUAGE) if cfg.corpus == "embedded" else None
    tasks = apt_finetune.load_tasks(cfg, lang, cfg.split_seed, cfg.seeds)
    corpus = load_corpus(run, cfg)
    mesh = mesh_for(cfg.batch)
    found = study(run, cfg, corpus, mesh)
    limit = planted_truth(run, cfg, corpus) if corpus.lang else None
    judged = judge(cfg, corpus, found, limit)
    tuned = []
    if tasks:
        setting = fine_tuning(run, cfg, corpus, found)
        tuned = apt_finetune.study(run, cfg, setting, tasks)
        judged += apt_finetune.judge(cfg, setting, tuned)
    run.write_claims(judged)
    write_tables(run, cfg, corpus, found, limit)
    draw(run, cfg, corpus, found, limit)
    if tuned:
        apt_finetune.write_tables(run, cfg, setting, tuned)
        apt_finetune.draw(run, cfg, setting, tuned)
    first, last = (np.mean([c.apt_R[m] for c in found.curves]) for m in (0, cfg.blocks))
    summary = [
        corpus.description + ".",
        f"BERT, {cfg.blocks} blocks of width {cfg.width}, {cfg.epochs} passes over W_S = {max(cfg.subset_sizes):,}: "
        f"<APT> goes from {first:.3f} at block 0 to {last:.3f} at block {cfg.blocks} over "
        f"{int(found.curves[0].tokens_R[0]):,} tokens. The paper reports 0.037 and 0.31 for an unpublished W_S.",
    ]
    overflow = sum(int(result["overflow"]) for result in found.main)
    asked = sum(int(result["totals"].sum()) for result in found.main)
    summary.append(
        f"{overflow:,} of {asked + overflow:,} chosen positions found no prediction slot and were left alone."
    )
    if limit is not None:
        summary.append(
            f"The generator's own (Bayes) predictor has <APT> {limit.apt:.3f} and micro accuracy {limit.micro:.3f}; "
            f"no predictor can have <APT> above {limit.apt_bound:.3f}."
        )
    summary += apt_finetune.summary(tuned)
    run.drop_stale()
    report.write(run, "Accuracy per token along the blocks of BERT-6", "Accuracy per token", summary, PAPER)


if __name__ == "__main__":
    sys.exit(
        cli.main(
            "apt",
            AptConfig,
            PRESETS,
            run_apt,
            "Accuracy per token, token confusion and its clusters along the blocks of BERT-6 (arXiv 2509.03407).",
            [
                "python -m experiments.apt",
                "python -m experiments.apt --seeds 3 --out runs/apt-3-seeds",
                "python -m experiments.apt --preset small --corpus wikipedia/ --vocab vocab.txt",
                "python -m experiments.apt --preset paper --corpus tfds:wiki40b/en --vocab vocab.txt --dtype bfloat16",
            ],
        )
    )
