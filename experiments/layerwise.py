"""What fine-tuning changes at which depth (arXiv 2502.16722): similarity, sparse dictionaries, labels.

    python -m experiments.layerwise                                                   a demo on generated text
    python -m experiments.layerwise --preset corrected --model CHECKPOINT --task news.csv,imdb.jsonl
    python -m experiments.layerwise --preset faithful --model BERT-FOLDER --task news.csv

Read from top to bottom: settings, model and text, fine-tuning, similarity, dictionaries, their evaluation, results,
claims, figures, views. One bank of dictionaries a task: every depth, before and after fine-tuning, every seed, side by
side in one compiled step. Two dictionaries that start apart share few latents even on the same model, so by default
those of the fine-tuned model go on from those of the pre-trained one, and beside them a control goes on just as long
without fine-tuning (stage-wise model diffing, Bricken et al. 2024). With `--no-warm-start` both start alike, and the
control is another start.

Presets: `corrected` (ours, the default's settings too) trains on single tokens without padding and splits by text;
`faithful` has the authors' settings, flaws included: stop-words gone, a random split that lets texts recur, sentence
means over padded positions, a barely sparse ReLU dictionary of which the analysis reads single tokens. Not taken over:
activations in another order than labels (their per-label results are void by it), gradient clipping, the choice of the
best epoch, the 1 % sample of the set (all of it is used, the test rows balanced over classes), and label box plots.

Letters beside those of `bert6_jax` and `sae_jax`: J depths that have dictionaries, N texts.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bert6_jax.train
from bert6_jax import checkpoint, classifier, hf, lora, similarity, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.data.labelled import LabelledText, Split, open_task, split_rows
from bert6_jax.data.tokenizer import Tokenizer, load_tokenizer
from bert6_jax.data.windows import steps_per_epoch
from bert6_jax.errors import InputError
from bert6_jax.masking import MaskingConfig
from bert6_jax.progress import Progress
from experiments import apt
from experiments.apt_finetune import finetune_step, member, slug, task_specs
from experiments.harness import claims, cli, figures, report
from experiments.harness.browser import Context, Feature, Group
from experiments.harness.claims import Claim, named, proportion
from experiments.harness.cli import option
from experiments.harness.run import Run
from sae_jax import activations, dictionary, evaluate
from sae_jax import train as dictionaries
from sae_jax.activations import Stream
from sae_jax.config import ACTIVATIONS, DictionaryConfig, TrainConfig
from sae_jax.losses import Hyper
from synthetic import language

PAPER = "2502.16722"
# s[l] of News in the authors' repository: bert-base, 50 headlines, depths 0 to 12 (sheet, section 4)
PUBLISHED_NEWS = (
    0.9993, 0.9915, 0.9710, 0.9622, 0.9487, 0.9276, 0.9039, 0.8729, 0.8412, 0.7893, 0.6925, 0.5645, 0.2751,
)  # fmt: skip
ROWS = 32  # texts of one forward pass
CONTROL = {  # by --warm-start
    True: "the control, trained on just as long on the pre-trained model",
    False: "the control, another start on the pre-trained model",
}


@dataclass(frozen=True)
class LayerwiseConfig:
    """Every setting that can change a result. What the paper leaves open is marked (ours)."""

    model: str = option("", "a transformer checkpoint of ours or a Hugging Face BERT folder; empty: pre-train a small "
                        "BERT-6 on the embedded corpus first", "data")  # fmt: skip
    vocab: Path | None = option(None, "its vocab.txt or tokenizer.json; none: the one beside the model", "data")
    task: tuple[str, ...] = option(
        ("embedded",), "`embedded` (`embedded-topic`, `embedded-relation`), fewrel, dbpedia, tfds:NAME, .csv or .jsonl "
        "files; several with commas", "data",
    )  # fmt: skip
    text_column: str = option("text", "column of the text", "data")
    label_column: str = option("label", "column of the class", "data")
    train_per_class: int = option(0, "training rows of a class; 0: all that the test leaves", "data", min=0)
    test_per_class: int = option(0, "test rows of a class; 0: a fifth of the smallest class", "data", min=0)
    split: str = option("text", "`text`: no text on both sides (ours); `random`: by rows, as the code", "data",
                        choices=("text", "random"))  # fmt: skip
    clean: bool = option(False, "the authors' cleaning: lower case, letters only, no stop-words", "data")
    length: int = option(0, "positions of a row; 0: the longest text, at most what the model has", "data", min=0)

    seed: int = option(0, "first seed", "fine-tuning", min=0, max=10**6)
    seeds: int = option(3, "fine-tunings, and starts of dictionaries; intervals are over them (ours)", "fine-tuning",
                        min=1)  # fmt: skip
    epochs: int = option(2, "passes over the training rows", "fine-tuning", min=1)
    batch: int = option(16, "rows of a batch", "fine-tuning", min=1)
    lr: float = option(2e-5, "AdamW learning rate", "fine-tuning", min=0.0)
    schedule: str = option("warmup_linear", "its schedule", "fine-tuning", choices=bert6_jax.train.SCHEDULES)
    warmup: float = option(0.0, "share of the steps that warm up", "fine-tuning", min=0.0, max=1.0)
    pooling: str = option("cls", "what the classifier reads", "fine-tuning", choices=classifier.POOLINGS)
    untrained_control: bool = option(True, "also fine-tune the same network from a random start (ours)", "fine-tuning")

    depths: tuple[int, ...] = option(
        (),
        "depths that get dictionaries; none: all, or with --plain a quarter, half and all of the blocks",
        "dictionaries",
        min=0,
    )
    unit: str = option("token", "a dictionary's row: a `token`, or the `sentence`'s mean over all positions, padding "
                       "included (the authors')", "dictionaries", choices=("token", "sentence"))  # fmt: skip
    mask_special: bool = option(False, "leave [CLS] and [SEP] out", "dictionaries")
    latents: int = option(1_024, "latents of a dictionary", "dictionaries", min=1)
    activation: str = option("topk", "what makes codes sparse (ours; the paper: relu)", "dictionaries",
                             choices=ACTIVATIONS)  # fmt: skip
    k: int = option(16, "active latents of a token, for topk and batch_topk (ours)", "dictionaries", min=1)
    sparsity: float = option(1.0, "weight of the penalty of the others", "dictionaries", min=0.0)
    plain: bool = option(False, "the authors' dictionary: untied, PyTorch's initialisation, free decoder, no centring, "
                         "no scaling, penalty on bare codes", "dictionaries")  # fmt: skip
    warm_start: bool = option(True, "dictionaries of the fine-tuned model go on from those of the pre-trained one, "
                              "for half as many steps (ours)", "dictionaries")  # fmt: skip
    dictionary_lr: float = option(1e-3, "Adam learning rate", "dictionaries", min=0.0)
    dictionary_batch: int = option(1_024, "rows of a batch", "dictionaries", min=1)
    dictionary_steps: int = option(0, "steps; 0: as many as --dictionary-epochs need", "dictionaries", min=0)
    dictionary_epochs: float = option(10.0, "passes over the training rows", "dictionaries", min=0.0)
    buffer: int = option(32_768, "rows of the shuffled buffer on the device", "dictionaries", min=1)
    dead_after: int = option(200_000, "rows without firing that make a latent dead", "dictionaries", min=1)
    checkpoint_every: int = option(1_000, "steps between checkpoints", "dictionaries", min=1)

    retained: float = option(0.9, "decoder cosine from which a matched latent is retained (ours)", "evaluation",
                             min=0.0, max=1.0)  # fmt: skip
    rotated: float = option(0.5, "and from which it is rotated, below it is new (ours)", "evaluation", min=0.0,
                            max=1.0)  # fmt: skip
    splice_texts: int = option(500, "test texts for splicing reconstructions into the model (ours)", "evaluation",
                               min=1)  # fmt: skip
    contexts: int = option(6, "top contexts of a latent in the browser", "evaluation", min=1)
    browser_latents: int = option(300, "latents of a dictionary in the browser, by label association", "evaluation",
                                  min=1)  # fmt: skip

    def __post_init__(self):
        if not self.task:
            raise InputError("--task is empty; name at least one")
        if not self.rotated <= self.retained:
            raise InputError(f"--rotated {self.rotated} is above --retained {self.retained}; give them in order")

    def dictionary(self, width: int) -> DictionaryConfig:
        kind: dict[str, Any] = {"activation": self.activation, "k": self.k}
        if self.activation == "jumprelu":
            kind["penalty"] = "l0"
        if self.activation in ("relu", "jumprelu"):
            kind["decoder"] = "free"
        if self.plain:
            kind |= {"subtract_bias": False, "decoder": "free", "code_norm": "none", "centre": False, "scale": "none"}
        if self.activation not in ("topk", "batch_topk"):
            kind["k"] = 1
        return DictionaryConfig(width, self.latents, **kind)

    def training(self, steps: int) -> TrainConfig:
        flat = {"lr_warmup": 0.0, "lr_decay": 0.0, "sparsity_warmup": 0.0} if self.plain else {}
        return TrainConfig(steps, self.dictionary_batch, dead_after=self.dead_after, **flat)


PRESETS = {
    "demo": LayerwiseConfig(
        epochs=6, batch=32, lr=2e-3, warmup=0.1, latents=128, k=4, dictionary_lr=3e-3, dictionary_batch=256,
        dictionary_steps=600, buffer=8_192, dead_after=20_000, browser_latents=60,
    ),
    "corrected": LayerwiseConfig(
        task=("",), epochs=3, lr=5e-4, warmup=0.1, batch=32, latents=512, k=16, train_per_class=0, test_per_class=200,
    ),
    "faithful": LayerwiseConfig(
        task=("",), split="random", clean=True, seeds=1, epochs=2, batch=16, lr=2e-5, untrained_control=False,
        unit="sentence", latents=1_024, activation="relu", plain=True, sparsity=1e-3,
        warm_start=False, dictionary_lr=2e-5, dictionary_batch=16, dictionary_epochs=2.0, checkpoint_every=10_000,
    ),
}  # fmt: skip


# --- model and text --------------------------------------------------------------------------------------------------


class Base(NamedTuple):
    """The pre-trained model."""

    params: Any
    model: TransformerConfig
    tokenizer: Tokenizer
    masking: MaskingConfig | None  # None: it has no masked-LM head
    lang: language.Language | None
    name: str


def load_base(run: Run, cfg: LayerwiseConfig) -> Base:
    """The model of `--model`, or one that is pre-trained on the embedded corpus here."""
    lang = None
    if not cfg.model:
        lang = language.make_language(apt.DEMO_LANGUAGE)
        size = max(apt.PRESETS["demo"].subset_sizes)
        pretraining = dataclasses.replace(
            apt.PRESETS["demo"], subset_sizes=(size,), seed=cfg.seed, task=(), checkpoint_every=10_000
        )
        depths_of(cfg, pretraining.blocks + 1)
        corpus, mesh = apt.load_corpus(run, pretraining), apt.mesh_for(pretraining.batch)
        params = apt.pretrain(run, pretraining, corpus, mesh, cfg.seed, size)
        params = jax.tree.map(jnp.asarray, jax.device_get(params))  # pre-trained on all devices, studied on one
        model, tokenizer = pretraining.model(corpus.tokenizer.vocab_size), corpus.tokenizer
        name = f"BERT-{model.blocks} of width {model.width}, pre-trained on {corpus.description}"
    else:
        path = Path(cfg.model).expanduser()
        if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
            params, model = hf.load(path)
            tokenizer, expected = load_tokenizer(cfg.vocab or path), None
        else:
            params, model, found = checkpoint.load_transformer(path)
            expected = (found.tokenizer or {}).get("sha256")
            files = (parent / "tokenizer.json" for parent in path.absolute().parents)
            beside = next((file for file in files if file.exists()), None)
            if cfg.vocab is None and beside is None:
                raise InputError(f"{path}: no tokenizer.json in the folders above it; give its vocabulary with --vocab")
            tokenizer = load_tokenizer(cfg.vocab or beside)
        if tokenizer.vocab_size > model.vocab_size or expected not in (None, tokenizer.sha256):
            raise InputError(
                f"{path} was trained with another vocabulary than the one found; name its own with --vocab"
            )
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(params))):
            raise InputError(f"{path}: its parameters are not finite (NaN or infinity); give another checkpoint")
        name = f"{path.name}: {model.blocks} blocks of width {model.width}"
    masking = None
    if model.head == "mlm" and "head" in params:
        never = (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id)
        masking = MaskingConfig(model.vocab_size, tokenizer.mask_id, never)
    return Base(params, model, tokenizer, masking, lang, name)


def keep_record(run: Run, base: Base, benches: Sequence[Bench]) -> None:
    """What the stages of this run are of; another model, vocabulary or text may not go on with them."""
    record = {"model": lora.fingerprint(base.params), "vocabulary": base.tokenizer.sha256}
    record |= {f"text of {bench.task.name}": bench.task.fingerprint for bench in benches}
    run.keep_record("base", record)
    if run.primary:
        (run.out / "checkpoints").mkdir(exist_ok=True)
        base.tokenizer.save(run.out / "checkpoints" / "tokenizer.json")


# The English stop-words of NLTK, which the authors drop, "not" and "no" among them.
STOP_WORDS = frozenset(
    """i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his
    himself she she's her hers herself it it's its itself they them their theirs themselves what which who whom this
    that that'll these those am is are was were be been being have has had having do does did doing a an the and but if
    or because as until while of at by for with about against between into through during before after above below to
    from up down in out on off over under again further then once here there when where why how all any both each few
    more most other some such no nor not only own same so than too very s t can will just don don't should should've now
    d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't haven haven't isn
    isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't weren weren't won
    won't wouldn wouldn't""".split()
)


def authors_cleaning(text: str) -> str:
    """The authors' cleaning in their order: addresses and tags are looked for when their characters are gone already,
    so `<br />` leaves "br"."""
    text = re.sub(r"[^a-zA-Z?.!,¿]+", " ", text.lower())
    text = re.sub(r"<.*?>", "", re.sub(r"http\S+", "", text))
    words = re.sub(r"[?.!,¿]", "", text).split()
    return " ".join(word for word in words if word not in STOP_WORDS)


class Bench(NamedTuple):
    """One task: its texts as rows, and who is trained and tested on what."""

    task: LabelledText
    examples: classifier.Examples
    split: Split

    @property
    def name(self) -> str:
        return slug(self.task.name)


def load_task(cfg: LayerwiseConfig, base: Base, spec: str) -> Bench:
    test = cfg.test_per_class
    if spec.startswith("embedded-"):
        if base.lang is None:
            raise InputError(f"--task {spec} is made of the embedded corpus; use it without --model")
        train = cfg.train_per_class or {"embedded-topic": 160, "embedded-relation": 80}[spec]
        test = test or {"embedded-topic": 60, "embedded-relation": 30}[spec]
        made = language.make_task(base.lang, spec.removeprefix("embedded-"), train + 2 * test, cfg.seed + 1)
        task = LabelledText(spec, "", made.classes, made.texts, made.label_N, None)
    elif not spec:
        raise InputError("this preset reads real text: give --task FILE.csv (or fewrel, dbpedia, tfds:NAME)")
    else:
        train = cfg.train_per_class
        task = open_task(spec, text_column=cfg.text_column, label_column=cfg.label_column)
        if not test and task.test_N is None:
            test = max(1, int(np.bincount(task.label_N).min()) // 5)
    if cfg.clean:
        task = dataclasses.replace(task, texts=[authors_cleaning(text) or "empty" for text in task.texts])
    split = split_rows(task, 42, train, test, by=cfg.split)
    length = min(cfg.length or base.model.max_len, base.model.max_len)
    examples = classifier.encode(base.tokenizer, task.texts, task.label_N, len(task.classes), length)
    if cfg.unit == "sentence":  # the authors' rows are as long as the model allows, mostly padding
        wider = ((0, 0), (0, length - examples.ids_NT.shape[1]))
        examples = examples._replace(
            ids_NT=np.pad(examples.ids_NT, wider, constant_values=base.tokenizer.pad_id),
            segment_NT=np.pad(examples.segment_NT, wider),
        )
    return Bench(task, examples, split)


def trunk_of(params) -> Any:
    """What all models of a study share: embedding and blocks, no head."""
    return {name: params[name] for name in ("embed", "blocks", "final_norm") if name in params}


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def finetune(run: Run, cfg: LayerwiseConfig, base: Base, bench: Bench, start: str, trunk) -> tuple[list, np.ndarray]:
    """Every seed's classifier from one trunk, all in one bank: (parameters a seed, test accuracy [seeds, 2] before,
    with a random head, and after)."""
    model, adapters, G = base.model, lora.LoraConfig(), cfg.seeds
    stage, folder = f"finetune-{bench.name}-{start}", run.out / "checkpoints" / bench.name / start
    paths = [folder / f"seed{cfg.seed + g}" for g in range(G)]
    starts = []
    for g in range(G):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(cfg.seed + g), 30_011), 2)
        head = classifier.init_head(keys[0], model, len(bench.task.classes), cfg.pooling)
        starts.append(classifier.split(keys[1], trunk, head, "full", adapters)[0])

    predict = jax.jit(partial(classifier.logits, cfg=model, pooling=cfg.pooling))

    def accuracy(params) -> float:
        rows = bench.split.test
        logits_NC = classifier.in_batches(bench.examples, rows, 2 * ROWS, lambda batch: predict(params, batch))
        return float((logits_NC.argmax(-1) == bench.examples.label_N[rows]).mean())

    def work():
        rows = bench.split.train
        per_epoch = steps_per_epoch(len(rows), cfg.batch)
        steps = cfg.epochs * per_epoch
        optimizer = bert6_jax.train.OptimizerConfig(cfg.lr, schedule=cfg.schedule, warmup=cfg.warmup)
        tx = bert6_jax.train.make_optimizer(optimizer, steps, per_epoch)
        state = bert6_jax.train.fit(
            finetune_step(model, cfg.pooling, adapters, optimizer, True),
            bert6_jax.train.init_state(dictionaries.stack(starts), tx, jax.random.key(cfg.seed)),
            classifier.bank_batches(bench.examples, [rows] * G, range(cfg.seed, cfg.seed + G), cfg.batch),
            bert6_jax.train.FitConfig(steps, min(16, steps), cfg.checkpoint_every),
            frozen={}, folder=folder / "state" if steps > cfg.checkpoint_every else None,
            description={"stage": stage}, on_metrics=lambda number, values: run.log(stage, number, **values),
            on_start=lambda number: run.rewind(stage, number), label=f"{bench.task.name}: fine-tune, {start}",
            tokens_per_step=G * cfg.batch * bench.examples.ids_NT.shape[1], quiet=run.quiet,
        )  # fmt: skip
        tuned = [jax.device_get(member(state.params, g)) for g in range(G)]
        extra = {"task": bench.task.name, "classes": list(bench.task.classes), "pooling": cfg.pooling}
        for path, params in zip(paths, tuned, strict=True):
            if not path.exists():
                checkpoint.save(path, params, kind="transformer", config=dataclasses.asdict(model) | {"head": "none"},
                                step=steps, tokenizer=apt.describe(base.tokenizer), extra=extra)  # fmt: skip
        shutil.rmtree(folder / "state", ignore_errors=True)
        return {
            "accuracy": np.array(
                [[accuracy(before), accuracy(after)] for before, after in zip(starts, tuned, strict=True)]
            )
        }

    result = run.stage(stage, work)
    return [checkpoint.load(path, kind="transformer").tree for path in paths], np.asarray(result["accuracy"])


# --- similarity ------------------------------------------------------------------------------------------------------


MEASURES = ("cosine", "centred_cosine", "shuffled", "centred_shuffled", "cka", "debiased_cka", "svcca", "pwcca",
            "procrustes", "rsa")  # fmt: skip


@partial(jax.jit, static_argnames="model")
def _pairs(a_X, b_X, batch, model: TransformerConfig):
    """Residual streams of X pairs of models, `[X, M, Y, D]` twice; which tokens count `[Y]`; and for each of them one
    of another text."""
    sites = activations.residual_sites(model)
    mask_Y = activations.token_mask(batch).reshape(-1)
    harvested = []
    for params_X in (a_X, b_X):
        x_XBTSD = jax.lax.map(lambda params: activations.harvest(params, batch, model, sites), params_X)
        X, B, T, S, D = x_XBTSD.shape
        harvested.append(jnp.moveaxis(x_XBTSD.reshape(X, B * T, S, D), 1, 2))
    # the tokens that count, in order, half of them further on: a partner from another text
    order_Y, n = jnp.argsort(~mask_Y, stable=True), jnp.maximum(mask_Y.sum(dtype=jnp.int32), 1)
    rank_Y = jnp.cumsum(mask_Y.astype(jnp.int32)) - 1
    return *harvested, mask_Y, order_Y[(rank_Y + n // 2) % n]


_start = jax.jit(jax.vmap(similarity.start, (0, 0, None)))
_update = jax.jit(jax.vmap(similarity.update, (0, 0, 0, None)))


@jax.jit
def _diagonal(x_XMYD, y_XMYD, valid_Y, mean_x=None, mean_y=None):
    """Summed cosine of the same depths, [X, M], of tokens with their means taken off if given."""
    if mean_x is not None:
        x_XMYD, y_XMYD = x_XMYD - mean_x[:, :, None], y_XMYD - mean_y[:, :, None]
    norms = jnp.linalg.norm(x_XMYD, axis=-1) * jnp.linalg.norm(y_XMYD, axis=-1)
    cosine_XMY = (x_XMYD * y_XMYD).sum(-1) / jnp.maximum(norms, 1e-30)
    return jnp.where(valid_Y[None, None], cosine_XMY, 0.0).sum(-1)


def compare(run: Run, base: Base, bench: Bench, label: str, a: Sequence, b: Sequence) -> dict[str, np.ndarray]:
    """Similarity of model a[x] and b[x] on the test texts' tokens (padding left out, [CLS] and [SEP] kept): every
    measure `[X, M]` at equal depths, `layers` [X, M, M] debiased CKA of all pairs, `tokens`."""
    a_X, b_X = (dictionaries.stack([trunk_of(params) for params in models]) for models in (a, b))
    moments, sums, mean_x, mean_y = None, {name: 0.0 for name in MEASURES[:4]}, None, None
    rows = bench.split.test
    with Progress(2 * len(rows), f"{bench.task.name}: similarity, {label}", "texts", quiet=run.quiet) as progress:
        for centred in (False, True):
            for begin in range(0, len(rows), ROWS):
                x, y, valid_Y, partner_Y = _pairs(a_X, b_X, bench.examples.filled(rows, begin, ROWS), base.model)
                if not centred:
                    moments = _start(x, y, valid_Y) if moments is None else moments
                    moments = _update(moments, x, y, valid_Y)
                means = (mean_x, mean_y) if centred else ()
                prefix = "centred_" * centred
                sums[f"{prefix}cosine"] += np.asarray(_diagonal(x, y, valid_Y, *means), np.float64)
                shuffled = _diagonal(x, y[:, :, partner_Y], valid_Y, *means)
                sums[f"{prefix}shuffled"] += np.asarray(shuffled, np.float64)
                progress.update(min(ROWS, len(rows) - begin))
            if not centred:
                pairs = [member(jax.device_get(moments), x) for x in range(len(a))]
                both = [similarity.means(m) for m in pairs]
                mean_x, mean_y = (jnp.asarray(np.stack(side), jnp.float32) for side in zip(*both, strict=True))
    tokens = int(pairs[0].count)
    found = {name: total / tokens for name, total in sums.items()}
    layers = np.stack([similarity.debiased_cka(m) for m in pairs])
    at = np.arange(base.model.depths)
    ccas = [similarity.cca(m, keep=0.99) for m in pairs]
    found["cka"] = np.stack([similarity.linear_cka(m)[at, at] for m in pairs])
    found["debiased_cka"] = layers[:, at, at]
    found["svcca"] = np.stack([c.mean[at, at] for c in ccas])
    found["pwcca"] = np.stack([c.weighted[at, at] for c in ccas])
    found["procrustes"] = np.stack([similarity.procrustes(m)[at, at] for m in pairs])
    found["rsa"] = np.stack([similarity.rsa(m)[at, at] for m in pairs])
    return found | {"layers": layers, "tokens": np.int64(tokens)}


# --- dictionaries ----------------------------------------------------------------------------------------------------


class Bank(NamedTuple):
    """The dictionaries of one task. Member (w, g, j): before (w = 0) and after (1) fine-tuning, the control (2: on the
    pre-trained model too), seed g, depth j; in this order. Site (x, j): model x (0: pre-trained, 1 + g: fine-tuned with
    seed g), depth j."""

    cfg: DictionaryConfig
    tree: dictionary.Dictionary  # [members, ...]
    depths: tuple[int, ...]
    seeds: int
    sites: np.ndarray  # [members]
    gamma: np.ndarray  # [members] |mean| / |std| of what a member reads

    @property
    def control(self) -> bool:
        return len(self.sites) > 2 * self.seeds * len(self.depths)

    def of(self, w: int, g: int, j: int) -> int:
        return (w * self.seeds + g) * len(self.depths) + j

    def block(self, values: np.ndarray, w: int) -> np.ndarray:
        """`[seeds, J, ...]` of `[members, ...]`."""
        size = self.seeds * len(self.depths)
        return values[w * size : (w + 1) * size].reshape(self.seeds, len(self.depths), *values.shape[1:])

    def both(self, values: np.ndarray) -> np.ndarray:
        """`[2, seeds, J, ...]`, before and after fine-tuning, of `[members, ...]`."""
        return np.stack([self.block(values, w) for w in (0, 1)])


def depths_of(cfg: LayerwiseConfig, there: int) -> tuple[int, ...]:
    L = there - 1
    # the authors': 3, 6 and 12 of 12 blocks
    every = tuple(sorted({-(-L // 4), -(-L // 2), L})) if cfg.plain else tuple(range(there))
    depths = tuple(sorted(set(cfg.depths))) or every
    if depths[-1] >= there:
        raise InputError(f"--depths {depths[-1]}: this model has the depths 0 to {there - 1}")
    return depths


def check_rows(cfg: LayerwiseConfig, base: Base, bench: Bench) -> None:
    """Refuse what the dictionaries cannot be trained on before anything else is trained."""
    rows, T = bench.split.train, bench.examples.ids_NT.shape[1]
    batch = {"ids": bench.examples.ids_NT[rows], "segment": bench.examples.segment_NT[rows]}
    tokens = int(np.asarray(activations.token_mask(batch, excluded(cfg, base))).sum())
    there, what = (len(rows), "training texts") if cfg.unit == "sentence" else (tokens, "tokens to train on")
    if there < cfg.dictionary_batch:
        raise InputError(
            f"{bench.task.name}: {there} {what} do not fill --dictionary-batch {cfg.dictionary_batch}; give a smaller "
            "one, or more text"
        )
    if cfg.unit == "token" and cfg.buffer < cfg.dictionary_batch + ROWS * T:
        raise InputError(
            f"--buffer {cfg.buffer} does not hold a batch of {cfg.dictionary_batch} and {ROWS} texts of {T} positions; "
            f"give {cfg.dictionary_batch + ROWS * T} or more"
        )


def excluded(cfg: LayerwiseConfig, base: Base) -> tuple[int, ...]:
    return (base.tokenizer.cls_id, base.tokenizer.sep_id) if cfg.mask_special else ()


def linear_start(key, cfg: DictionaryConfig):
    """PyTorch's initialisation of two linear layers, as the authors' dictionaries have it."""
    F, D = cfg.latents, cfg.width
    keys = jax.random.split(key, 4)
    shapes = {"W_enc": ((1, F, D), D), "b_enc": ((F,), D), "W_dec": ((1, F, D), F), "b_dec": ((1, D), F)}
    return {
        name: jax.random.uniform(k, shape, minval=-1.0, maxval=1.0) * np.float32(1 / np.sqrt(inputs))
        for k, (name, (shape, inputs)) in zip(keys, shapes.items(), strict=True)
    }


def sentence_means(cfg: LayerwiseConfig, base: Base, bench: Bench, params_X, depths, rows) -> np.ndarray:
    """The authors' rows: the mean over all positions of a text, padding included, `[N, S, D]`."""
    sites = tuple(("resid", depth) for depth in depths)

    @jax.jit
    def means(params_X, batch):
        return activations.harvest_models(params_X, batch, base.model, sites).mean(1)

    return classifier.in_batches(bench.examples, rows, ROWS, lambda batch: means(params_X, batch))


def train_dictionaries(run: Run, cfg: LayerwiseConfig, base: Base, bench: Bench, models: Sequence) -> Bank:
    """All dictionaries of a task; `models`: the pre-trained one, then the fine-tuned ones."""
    depths, G = depths_of(cfg, base.model.depths), cfg.seeds
    J, rows, dict_cfg = len(depths), bench.split.train, cfg.dictionary(base.model.width)
    params_X = dictionaries.stack([trunk_of(params) for params in models])
    if cfg.unit == "sentence":
        x_NSD = jnp.asarray(sentence_means(cfg, base, bench, params_X, depths, rows))
        activations.check_finite(x_NSD, [f"depth {d} of model {x}" for x in range(len(models)) for d in depths])
        source, frozen, inputs, total = {}, {"x": x_NSD}, activations.resident, len(rows)
        batch_at = activations.row_batches(cfg.seed, len(rows), cfg.dictionary_batch)
    else:
        stream = Stream(
            base.model, tuple(("resid", depth) for depth in depths), rows=ROWS, batch=cfg.dictionary_batch,
            capacity=cfg.buffer, exclude=excluded(cfg, base),
        )  # fmt: skip
        order = rows[np.random.default_rng(cfg.seed).permutation(len(rows))]
        tokens = activations.token_rows(bench.examples.ids_NT, bench.examples.segment_NT, order)
        total = int(np.asarray(activations.token_mask(tokens, stream.exclude)).sum())
        source, frozen = activations.open_stream(stream, params_X, tokens, cfg.seed)
        x_NSD, inputs, batch_at = source["x"][: int(source["count"])], streaming(stream), activations.no_batch
    steps = cfg.dictionary_steps or max(1, round(cfg.dictionary_epochs * total / cfg.dictionary_batch))
    # lambda of the sum of squared errors: the authors' 1e-3 stands before means, over D elements and F codes
    sparsity = cfg.sparsity * base.model.width / cfg.latents if cfg.plain else cfg.sparsity
    hyper = Hyper(lr=cfg.dictionary_lr, k=cfg.k, sparsity=sparsity)

    def look(site):
        x_NHD = x_NSD[:, site][:, None]
        return dictionary.fit_norm(x_NHD, dict_cfg), evaluate.gamma(x_NHD)[0]

    def fit(name: str, site_of: np.ndarray, params, steps: int):
        """A bank of dictionaries, trained or, if it was before, loaded; and gamma of its members."""
        norm, gamma = jax.jit(jax.vmap(look))(jnp.asarray(site_of))
        path = run.out / "checkpoints" / bench.name / name
        if path.exists():
            return finished_bank(path, dict_cfg, len(site_of)), np.asarray(gamma)
        members = [{"model": "pre-trained" if site < J else f"fine-tuned, seed {cfg.seed + site // J - 1}",
                    "depth": depths[site % J]} for site in site_of.tolist()]  # fmt: skip
        state = dictionaries.init_state(
            jax.random.key(cfg.seed), dict_cfg, cfg.training(steps), [hyper] * len(site_of), norm, params=params,
            sites=site_of[:, None], source=source,
        )  # fmt: skip
        tree = fit_bank(
            run, path, state, dict_cfg, cfg.training(steps), inputs, batch_at, frozen, stage=f"{name}-{bench.name}",
            label=f"{bench.task.name}: {len(site_of)} {name}", checkpoint_every=cfg.checkpoint_every,
            extra={"task": bench.task.name, "members": members},
        )  # fmt: skip
        return tree, np.asarray(gamma)

    start = linear_start if cfg.plain else dictionary.init
    first = dictionaries.stack(
        [start(jax.random.fold_in(jax.random.key(cfg.seed + g), 40_009), dict_cfg) for g in range(G) for _ in range(J)]
    )
    before = np.array([j for _ in range(G) for j in range(J)])
    after = np.array([(1 + g) * J + j for g in range(G) for j in range(J)])

    def joined(*trees):
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *map(jax.device_get, trees))

    if cfg.warm_start:
        tree, gamma = fit("dictionaries-before", before, first, steps)
        sites = np.concatenate([after, before])
        more, gammas = fit("dictionaries-after", sites, joined(tree["params"], tree["params"]), max(1, steps // 2))
        tree, gamma, sites = joined(tree, more), np.concatenate([gamma, gammas]), np.concatenate([before, sites])
    else:
        sites = np.concatenate([before, after])
        tree, gamma = fit("dictionaries", sites, joined(first, first), steps)
        if G > 1:  # the control is the pre-trained model's dictionary from the next seed's start
            other = np.array([((g + 1) % G) * J + j for g in range(G) for j in range(J)])
            tree = joined(tree, jax.tree.map(lambda leaf: leaf[other], tree))
            gamma, sites = np.concatenate([gamma, gamma[other]]), np.concatenate([sites, before])
    return Bank(dict_cfg, jax.device_put(tree), depths, G, sites, gamma)


# One function a stream and a step a shape: tasks of one study share their compiled programs.
streaming = cache(activations.streaming)


@cache
def dictionary_step(cfg: DictionaryConfig, train_cfg: TrainConfig, inputs):
    return dictionaries.make_step(cfg, train_cfg, inputs)


def finished_bank(path: Path, dict_cfg: DictionaryConfig, members: int) -> dictionary.Dictionary:
    """The bank that `fit_bank` left in a folder."""
    tree, found, _ = dictionary.load(path)
    if found != dict_cfg or len(tree["threshold"]) != members:
        raise InputError(f"{path} holds other dictionaries; remove that folder or use another --out")
    return tree


def fit_bank(
    run: Run, path: Path, state: dictionaries.BankState, dict_cfg: DictionaryConfig, train_cfg: TrainConfig, inputs,
    batch_at, frozen, *, stage: str, label: str, checkpoint_every: int, extra: dict[str, Any],
) -> dictionary.Dictionary:  # fmt: skip
    """Train a bank to its end, going on from its checkpoints, and keep it in `path`; the tree, on the host."""
    steps, unfinished = train_cfg.steps, path.with_name(f"{path.name}-state")
    every = max(1, steps // 50)
    state = bert6_jax.train.fit(
        dictionary_step(dict_cfg, train_cfg, inputs), state, batch_at,
        bert6_jax.train.FitConfig(steps, min(16, steps), checkpoint_every),
        frozen=frozen, folder=unfinished if steps > checkpoint_every else None, description={"stage": stage},
        on_metrics=lambda number, values: run.log(stage, number, **values) if number % every == 0 else None,
        on_start=lambda number: run.rewind(stage, number), quiet=run.quiet, label=label,
    )  # fmt: skip
    tree = jax.device_get(dictionaries.members(state))
    dictionary.save(path, tree, dict_cfg, step=steps, extra=extra)
    shutil.rmtree(unfinished, ignore_errors=True)
    return tree


def evaluate_bank(run: Run, cfg: LayerwiseConfig, base: Base, bench: Bench, bank: Bank, models: Sequence) -> dict:
    """Everything that the test texts say about the dictionaries, on single tokens; arrays with a leading axis of
    members, and for the latents of the two sides of a seed and depth their correlation."""
    G, J, F, C = bank.seeds, len(bank.depths), bank.cfg.latents, len(bench.task.classes)
    members, rows, examples = len(bank.sites), bench.split.test, bench.examples
    params_X = dictionaries.stack([trunk_of(params) for params in models])
    sites = tuple(("resid", depth) for depth in bank.depths)
    read = jnp.asarray(bank.sites)
    # a pre-trained model's dictionary also reads the fine-tuned states of its seed and depth
    other = jnp.asarray([(1 + g) * J + j for g in range(G) for j in range(J)])
    size = G * J

    @jax.jit
    def look(tree, params_X, batch):
        x_RTSD = activations.harvest_models(params_X, batch, base.model, sites)
        R, T, S, D = x_RTSD.shape
        mask_RT = activations.token_mask(batch, excluded(cfg, base))
        x_YSD, mask_Y = x_RTSD.reshape(R * T, S, D), mask_RT.reshape(-1)
        label_Y = jnp.broadcast_to(batch["label"][:, None], (R, T)).reshape(-1)

        def one(tree, site):
            x_YHD = x_YSD[:, site][:, None]
            xhat_YHD, z_YF = dictionary.reconstruct(tree, x_YHD, bank.cfg)
            return evaluate.stats_of(x_YHD, xhat_YHD, z_YF, mask_Y), jnp.where(mask_Y[:, None], z_YF, 0.0)

        stats, z_MYF = jax.vmap(one)(tree, read)
        crossed, _ = jax.vmap(one)(jax.tree.map(lambda leaf: leaf[:size], tree), other)
        counts = jax.vmap(lambda z: evaluate.association_counts(z, label_Y, mask_Y, C))(z_MYF)
        moments = jax.vmap(lambda a, b: evaluate.cross_moments(a, b, mask_Y))(z_MYF[:size], z_MYF[size : 2 * size])
        return stats, crossed, counts, moments, z_MYF.reshape(members, R, T, F), mask_RT

    add = jax.jit(lambda a, b: (*(jax.vmap(evaluate.add)(x, y) for x, y in zip(a[:2], b[:2], strict=True)),
                                *(jax.tree.map(jnp.add, x, y) for x, y in zip(a[2:], b[2:], strict=True))))  # fmt: skip
    top_update = jax.jit(jax.vmap(evaluate.top_update, (0, 0, None, None)))
    top = jax.vmap(lambda _: evaluate.top_init(F, cfg.contexts))(jnp.arange(members))
    total, strongest = None, np.zeros((members, len(rows), F), np.float32)
    with Progress(len(rows), f"{bench.task.name}: read the dictionaries", "texts", quiet=run.quiet) as progress:
        for begin in range(0, len(rows), ROWS):
            batch = examples.filled(rows, begin, ROWS)
            *sums, z_MRTF, mask_RT = look(bank.tree, params_X, batch)
            total = tuple(sums) if total is None else add(total, tuple(sums))
            top = top_update(top, z_MRTF, jnp.arange(begin, begin + ROWS, dtype=jnp.int32), mask_RT)
            count = min(ROWS, len(rows) - begin)
            strongest[:, begin : begin + count] = np.asarray(z_MRTF.max(2))[:, :count]
            progress.update(count)
    stats, crossed, counts, moments = (jax.device_get(part) for part in total)
    found = {name: np.asarray(value) for name, value in evaluate.summary(stats).items()}
    found["ev_of_fine_tuned"] = np.asarray(evaluate.summary(crossed)["ev_global"])
    found["mutual_information"] = np.stack(
        [evaluate.mutual_information(member(counts, m), miller_madow=True) for m in range(members)]
    )
    label_N = examples.label_N[rows]
    permuted_N = np.random.default_rng(7).permutation(label_N)  # what labels that mean nothing would give
    for name, labels in (("auroc", label_N), ("auroc_shuffled", permuted_N)):
        auroc_MCF = np.stack([evaluate.auroc(z_NF, labels, C) for z_NF in strongest])
        found[name], found[f"{name}_class"] = auroc_MCF.max(1), auroc_MCF.argmax(1)
    correlations = [evaluate.correlation(member(moments, p)) for p in range(size)]
    found["correlation"] = np.stack(correlations).astype(np.float32)
    found |= {f"top_{name}": np.asarray(leaf) for name, leaf in zip(("value", "row", "position"), top, strict=True)}
    return found | splice_losses(run, cfg, base, bench, bank, models)


def splice_losses(run: Run, cfg: LayerwiseConfig, base: Base, bench: Bench, bank: Bank, models: Sequence) -> dict:
    """Loss when a member's reconstruction takes the stream's place: the classifier's after fine-tuning, the masked-LM
    loss before; clean, spliced and with zeros, `[members, 3]` nats, NaN where the model has no such head."""
    G, J, special = bank.seeds, len(bank.depths), excluded(cfg, base)
    depths_J, rows = jnp.asarray(bank.depths), bench.split.test[: cfg.splice_texts]
    slots = max(4, bench.examples.ids_NT.shape[1] // 4)
    masking = base.masking and dataclasses.replace(base.masking, slots=slots)

    @partial(jax.jit, static_argnames="after")
    def losses(params, trees_XJ, batch, key, after: bool):
        """Sums of a batch, `[X, J]` spliced, `[J]` zeros, clean, and what they are sums over."""
        replaced_BT = activations.token_mask(batch, special)

        def loss(depth, fn):
            if after:
                return evaluate.classifier_loss_spliced(params, base.model, cfg.pooling, batch, depth, fn, replaced_BT)
            return evaluate.mlm_loss_spliced(params, base.model, masking, batch, key, depth, fn, replaced_BT)

        def spliced(args):
            tree, depth = args
            return loss(depth, evaluate.reconstructor(tree, bank.cfg))["loss"]

        clean = loss(0, lambda x_BTD: x_BTD)
        spliced_XJ = jax.lax.map(lambda trees_J: jax.lax.map(spliced, (trees_J, depths_J)), trees_XJ)
        zeros_J = jax.lax.map(lambda depth: loss(depth, jnp.zeros_like)["loss"], depths_J)
        return spliced_XJ, zeros_J, clean["loss"], clean["count"]

    found = np.full((len(bank.sites), 3), np.nan)
    # the pre-trained model is one for all seeds, the fine-tuned ones are one each
    work = [(1, [g], models[1 + g]) for g in range(G)] + ([(0, list(range(G)), base.params)] if masking else [])
    with Progress(len(work) * len(rows), f"{bench.task.name}: splice", "texts", quiet=run.quiet) as progress:
        for after, seeds, params in work:
            members_XJ = np.array([[bank.of(after, g, j) for j in range(J)] for g in seeds])
            trees_XJ = jax.tree.map(lambda leaf, members_XJ=members_XJ: leaf[members_XJ], bank.tree)
            totals = None
            for begin in range(0, len(rows), ROWS):
                key = jax.random.fold_in(jax.random.key(50_021), begin)
                sums = losses(params, trees_XJ, bench.examples.filled(rows, begin, ROWS), key, bool(after))
                sums = [np.asarray(value, np.float64) for value in sums]
                totals = sums if totals is None else [a + b for a, b in zip(totals, sums, strict=True)]
                progress.update(min(ROWS, len(rows) - begin))
            spliced_XJ, zeros_J, clean, count = totals
            found[members_XJ, 0], found[members_XJ, 1] = clean / count, spliced_XJ / count
            found[members_XJ, 2] = np.broadcast_to(zeros_J / count, members_XJ.shape)
    return {"spliced": found}


# --- results ---------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """One task."""

    bench: Bench
    accuracy: np.ndarray  # [seeds, 2]
    similarity: dict[str, np.ndarray]  # before against after
    controls: dict[str, dict[str, np.ndarray]]  # "other seed": two fine-tunings; "untrained": from a random start
    bank: Bank
    found: dict[str, np.ndarray]
    shares: dict[str, np.ndarray]  # of latents after fine-tuning, by what became of them: [seeds, J]
    matching: dict[tuple[int, int], evaluate.Matching]  # (seed, j): after against before


def compare_dictionaries(cfg: LayerwiseConfig, bank: Bank, found: dict) -> tuple[dict, dict]:
    """Match each dictionary after fine-tuning with the one before it of the same seed and depth; the same for the
    control, and for random directions. Latents that never fire on the test texts stay out."""
    G, J = bank.seeds, len(bank.depths)
    W_MFD = np.asarray(bank.tree["params"]["W_dec"][:, 0])
    alive_MF = found["density_F"] > 0
    kinds = ("retained", "rotated", "new")
    shares: dict[str, list] = {}
    matching = {}
    settings = {"retained": cfg.retained, "rotated": cfg.rotated}
    for g in range(G):
        for j in range(J):
            a, b, c = (bank.of(w, g, j) for w in range(3))
            use = {"alive_F": alive_MF[a], "alive_E": alive_MF[b]} | settings
            matching[g, j] = evaluate.match(W_MFD[a], W_MFD[b], **use)
            arms = {"": matching[g, j], "chance_": evaluate.match_chance(W_MFD[a], W_MFD[b], **use)}
            if bank.control:
                arms["control_"] = evaluate.match(
                    W_MFD[a], W_MFD[c], alive_F=alive_MF[a], alive_E=alive_MF[c], **settings
                )
            for arm, matched in arms.items():
                total = sum(matched.counts[kind] for kind in kinds)
                for kind in kinds:
                    shares.setdefault(arm + kind, []).append(matched.counts[kind] / total)
            index_E = matching[g, j].index_E
            paired = np.flatnonzero(index_E >= 0)
            correlation_FE = found["correlation"][g * J + j]
            shares.setdefault("correlation", []).append(float(correlation_FE[index_E[paired], paired].mean()))
    return {name: np.array(values).reshape(G, J) for name, values in shares.items()}, matching


def alive_mean(found: dict, name: str, bank: Bank) -> np.ndarray:
    """Mean over the latents that fire, `[2, seeds, J]` (before, after)."""
    alive_MF = found["density_F"] > 0
    mean_M = np.where(alive_MF, found[name], 0.0).sum(-1) / np.maximum(alive_MF.sum(-1), 1)
    return bank.both(mean_M)


def study(run: Run, cfg: LayerwiseConfig, base: Base, bench: Bench) -> Result:
    say = f"{bench.task.name}: {len(bench.split.train):,} training and {len(bench.split.test):,} test texts"
    run.say(f"{say}, {bench.split.shared_texts} of these also in training; {bench.examples.cut_N.mean():.1%} cut")
    tuned, accuracy = finetune(run, cfg, base, bench, "pre-trained", base.params)
    G = cfg.seeds
    first = partial(compare, run, base, bench)
    main = run.stage(f"similarity-{bench.name}", partial(first, "before and after", [base.params] * G, tuned))
    controls = {}
    if G > 1:
        pairs = G if G > 2 else 1  # two seeds are one pair, not two
        work = partial(first, "two seeds", tuned[:pairs], (tuned[1:] + tuned[:1])[:pairs])
        controls["other seed"] = run.stage(f"similarity-{bench.name}-seeds", work)
    if cfg.untrained_control:
        key = jax.random.fold_in(jax.random.key(cfg.seed), 60_013)
        random = jax.jit(transformer.init, static_argnums=1)(key, base.model)
        after, _ = finetune(run, cfg, base, bench, "untrained", random)
        work = partial(first, "untrained", [random] * G, after)
        controls["untrained"] = run.stage(f"similarity-{bench.name}-untrained", work)
    models = [base.params, *tuned]
    bank = train_dictionaries(run, cfg, base, bench, models)
    found = run.stage(f"read-{bench.name}", partial(evaluate_bank, run, cfg, base, bench, bank, models))
    shares, matching = compare_dictionaries(cfg, bank, found)
    return Result(bench, accuracy, main, controls, bank, found, shares, matching)


# --- claims: the rules, written before the runs in RESULTS.md --------------------------------------------------------


def judge(cfg: LayerwiseConfig, results: Sequence[Result]) -> list[Claim]:
    judged = []

    def add(name: str, bench: Bench, where: str, statement: str, expected, outcome) -> None:
        judged.append(Claim(f"{name}-{bench.name}", f"arXiv {PAPER}, {where}", f"{bench.task.name}: {statement}",
                            expected, *outcome))  # fmt: skip

    control = "training on without it" if cfg.warm_start else "another start of the dictionary"
    for r in results:
        curve_GM = np.asarray(r.similarity["cosine"])
        drops_GM = -np.diff(curve_GM, axis=1)
        add("similarity-falls", r.bench, "layer similarity", "the cosine between pre-trained and fine-tuned states "
            "falls with depth", "falls", claims.increasing(-curve_GM))  # fmt: skip
        add("steepest-last", r.bench, "layer similarity", "it falls most in the last block (its fall minus the largest "
            "other one, or minus nothing)", "> 0",
            claims.greater_than(drops_GM[:, -1] - np.maximum(drops_GM[:, :-1].max(1), 0.0), 0.0)
            if drops_GM.shape[1] > 1
            else claims.not_tested("needs two blocks"))  # fmt: skip
        above = (curve_GM - r.similarity["shuffled"]).min(1)
        add("above-shuffled", r.bench, "ours", "at every depth it is above that of shuffled tokens", "> 0",
            claims.greater_than(above, 0.0))  # fmt: skip
        # what training alone moves is taken off: it makes latents "new" at every depth
        beyond = "beyond the control" if r.bank.control else "(no control)"
        new_GJ = r.shares["new"] - r.shares.get("control_new", 0.0)
        kept_GJ, J = r.shares["retained"] - r.shares.get("control_retained", 0.0), len(r.bank.depths)
        late, early = J - 1, min(1, J - 1) if r.bank.depths[0] == 0 else 0
        add("new-late", r.bench, "early layers stay general, late ones specialise", "more latents are new at the last "
            f"depth than at depth {r.bank.depths[early]} (share {beyond})", "> 0",
            claims.greater_than(new_GJ[:, late] - new_GJ[:, early], 0.0) if late > early
            else claims.not_tested("needs dictionaries at two depths"))  # fmt: skip
        add("retained-early", r.bench, "early layers stay general, late ones specialise", "more latents are retained "
            f"at depth {r.bank.depths[early]} than at the last (share {beyond})", "> 0",
            claims.greater_than(kept_GJ[:, early] - kept_GJ[:, late], 0.0) if late > early
            else claims.not_tested("needs dictionaries at two depths"))  # fmt: skip
        add("retained-beyond-control", r.bench, "ours", "at the last depth fewer latents are retained than of the "
            f"control ({control})", "> 0",
            claims.greater_than(r.shares["control_retained"][:, late] - r.shares["retained"][:, late], 0.0)
            if "control_retained" in r.shares else claims.not_tested("needs several seeds"))  # fmt: skip
        auroc_2GJ = alive_mean(r.found, "auroc", r.bank)
        add("labels-after", r.bench, "late layers specialise", "at the last depth latents tell the classes better "
            "after fine-tuning than before (mean best AUROC)", "> 0",
            claims.greater_than(auroc_2GJ[1, :, late] - auroc_2GJ[0, :, late], 0.0))  # fmt: skip
        add("labels-late", r.bench, "late layers specialise", "after fine-tuning they tell them better at the last "
            f"depth than at depth {r.bank.depths[early]}", "> 0",
            claims.greater_than(auroc_2GJ[1, :, late] - auroc_2GJ[1, :, early], 0.0) if late > early
            else claims.not_tested("needs dictionaries at two depths"))  # fmt: skip
    return judged


# --- tables, figures, views ------------------------------------------------------------------------------------------


def write_tables(run: Run, cfg: LayerwiseConfig, results: Sequence[Result]) -> None:
    over = f"mean and 95 % t interval over {cfg.seeds} seeds" if cfg.seeds > 1 else "one seed"
    rows = []
    for r in results:
        rows.append({"task": r.bench.task.name, "classes": len(r.bench.task.classes),
                     "train_rows": len(r.bench.split.train), "test_rows": len(r.bench.split.test),
                     "shared_texts": r.bench.split.shared_texts, "cut_texts": float(r.bench.examples.cut_N.mean())}
                    | proportion("random_head", r.accuracy[:, 0])
                    | proportion("fine_tuned", r.accuracy[:, 1]))  # fmt: skip
    run.table("accuracy", rows, f"Test accuracy of the pre-trained model with a random head, and fine-tuned; {over}. "
              "shared_texts: test rows whose text is also in training.")  # fmt: skip
    rows = []
    for r in results:
        for pair, found in {"before, after": r.similarity, **r.controls}.items():
            for depth in range(found["cosine"].shape[1]):
                line = {"task": r.bench.task.name, "pair": pair, "depth": depth, "tokens": int(found["tokens"])}
                for name in MEASURES:
                    line |= named(name, found[name][:, depth])
                rows.append(line)
    run.table("similarity_by_depth", rows, f"Similarity of two models' states at equal depth, token by token; {over}. "
              "shuffled: cosine with another token of the batch, of another text where there is one. svcca: directions "
              "that carry 99 % of the variance.",
              )  # fmt: skip
    rows = []
    for r in results:
        G = r.bank.seeds
        spliced = r.bank.both(r.found["spliced"])
        told = {name: alive_mean(r.found, name, r.bank) for name in ("auroc", "auroc_shuffled", "mutual_information")}
        for after in (0, 1):
            for j, depth in enumerate(r.bank.depths):
                at = [r.bank.of(after, g, j) for g in range(G)]
                line = {"task": r.bench.task.name, "model": "fine-tuned" if after else "pre-trained", "depth": depth}
                for name in ("ev_global", "ev_per_token", "ev_variance", "ev_correlation", "nmse_uncentred", "cosine",
                             "l0", "dead", "rare"):  # fmt: skip
                    line |= named(name, r.found[name][at])
                clean, loss, zeros = (spliced[after, :, j, i] for i in range(3))
                line |= named("loss_clean", clean) | named("loss_spliced", loss) | named("loss_zeros", zeros)
                line |= named("loss_recovered", evaluate.recovered(clean, loss, zeros))
                line |= named("ev_of_fine_tuned", r.found["ev_of_fine_tuned"][at] if not after else [])
                line |= named("gamma", r.bank.gamma[at])
                for name, values_2GJ in told.items():
                    line |= named(name, values_2GJ[after, :, j])
                rows.append(line)
    run.table("dictionaries", rows, "Dictionaries on single tokens of the test texts, by model and depth; "
              f"{over}. ev_*: explained variance by each published definition; dead: silent on the test texts; loss "
              "(nats): masked-LM before, classifier after fine-tuning, with the reconstruction spliced in, or zeros; "
              "ev_of_fine_tuned: a dictionary of the pre-trained model on fine-tuned states; gamma: |mean| / |std|; "
              "auroc: best class of a latent by its strongest code in a text, mean over latents that fire (shuffled: "
              "labels permuted); mutual_information: nats, token by token.")  # fmt: skip
    rows = []
    for r in results:
        for j, depth in enumerate(r.bank.depths):
            line = {"task": r.bench.task.name, "depth": depth}
            for name, values in r.shares.items():
                line |= named(name, values[:, j]) if name == "correlation" else proportion(name, values[:, j])
            rows.append(line)
    run.table("matching", rows, "What the latents after fine-tuning were before, one to one by decoder cosine: "
              f"retained (>= {cfg.retained:g}), rotated (>= {cfg.rotated:g}), new; {over}. control_*: "
              f"{CONTROL[cfg.warm_start]}; chance_*: random directions; correlation: of the matched "
              "codes.")  # fmt: skip


@figures.style()
def draw(run: Run, cfg: LayerwiseConfig, results: Sequence[Result]) -> None:
    over = f"95 % interval over {cfg.seeds} seeds" if cfg.seeds > 1 else "one seed"

    def panels(rows: int, height: float):
        return figures.new(rows, len(results), height=height, squeeze=False)

    def below(fig, axes):
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

    fig, axes = panels(2, 6.4)
    for column, r in enumerate(results):
        M = r.similarity["cosine"].shape[1]
        x = np.arange(M)
        for row, (name, shuffled) in enumerate((("cosine", "shuffled"), ("centred_cosine", "centred_shuffled"))):
            ax = axes[row, column]
            figures.seed_band(ax, x, r.similarity[name], label="before and after fine-tuning")
            for control, found in r.controls.items():
                label = {"other seed": "two fine-tunings", "untrained": "untrained network, before and after"}[control]
                figures.seed_band(ax, x, found[name], label=label)
            figures.seed_band(ax, x, r.similarity[shuffled], label="shuffled tokens", linestyle=":", color="#777777")
            if row == 0 and r.bench.name.lower().startswith("news"):
                published = np.array(PUBLISHED_NEWS)
                ax.plot(np.linspace(0, M - 1, len(published)), published, "--", color="#000000", marker="",
                        label="published: bert-base, 12 blocks")  # fmt: skip
            title = figures.plain(r.bench.task.name) + (", centred" if row else "")
            ax.set(xlabel="depth (0: embedding)", ylabel="mean cosine", title=title)
    below(fig, axes)
    run.figure("similarity_by_depth", fig, alt="Cosine of pre-trained and fine-tuned states against depth",
               caption="Cosine of a token's state before and after fine-tuning, raw (top) and with each model's mean "
               f"taken off (bottom). Bands: {over}.")  # fmt: skip

    fig, axes = panels(1, 3.4)
    for ax, r in zip(axes[0], results, strict=True):
        figures.heatmap(ax, r.similarity["layers"].mean(0), label="debiased CKA", vmin=0, vmax=1)
        ax.set(xlabel="depth after fine-tuning", ylabel="depth before", title=figures.plain(r.bench.task.name))
    run.figure("cka_of_depths", fig, alt="Heat map of CKA between all depths before and after fine-tuning",
               caption="Debiased linear CKA of every depth before with every depth after fine-tuning.")  # fmt: skip

    fig, axes = panels(1, 3.8)
    for ax, r in zip(axes[0], results, strict=True):
        for kind, colour in zip(("retained", "rotated", "new"), figures.PALETTE, strict=False):
            figures.seed_band(ax, r.bank.depths, r.shares[kind], label=kind, color=colour)
            if f"control_{kind}" in r.shares:
                mean = r.shares[f"control_{kind}"].mean(0)
                ax.plot(r.bank.depths, mean, linestyle=":", marker="", color=colour, label=f"{kind}, control")
        ax.set(xlabel="depth", ylabel="share of latents", ylim=(0, 1.02), title=figures.plain(r.bench.task.name))
    below(fig, axes)
    run.figure("retained_by_depth", fig, alt="Share of latents retained, rotated and new against depth",
               caption="What the latents after fine-tuning were before it, matched by decoder cosine; "
               f"dotted: {CONTROL[cfg.warm_start]}. Bands: {over}.")  # fmt: skip

    fig, axes = panels(1, 3.8)
    for ax, r in zip(axes[0], results, strict=True):
        auroc_2GJ, shuffled_2GJ = (alive_mean(r.found, name, r.bank) for name in ("auroc", "auroc_shuffled"))
        for after, label in ((0, "pre-trained"), (1, "fine-tuned")):
            figures.seed_band(ax, r.bank.depths, auroc_2GJ[after], label=label)
        figures.seed_band(ax, r.bank.depths, shuffled_2GJ[1], label="labels shuffled", linestyle=":", color="#777777")
        ax.set(xlabel="depth", ylabel="mean AUROC of the best class", title=figures.plain(r.bench.task.name))
    below(fig, axes)
    run.figure("association_by_depth", fig, alt="Association of latents with labels against depth",
               caption="How well a latent's strongest code in a text tells its best class, mean over the latents that "
               f"fire. Bands: {over}.")  # fmt: skip

    fig, axes = figures.new(1, 2, height=3.6)
    for r, colour in zip(results, figures.PALETTE, strict=False):
        ev_2GJ, spliced = r.bank.both(r.found["ev_global"]), r.bank.both(r.found["spliced"])
        for after, style in ((0, ":"), (1, "-")):
            label = f"{r.bench.task.name}, {'fine-tuned' if after else 'pre-trained'}"
            figures.seed_band(axes[0], r.bank.depths, ev_2GJ[after], label=label, linestyle=style, color=colour)
            clean, loss, zeros = (spliced[after, ..., i] for i in range(3))
            figures.seed_band(
                axes[1], r.bank.depths, evaluate.recovered(clean, loss, zeros), linestyle=style, color=colour
            )
    axes[0].set(xlabel="depth", ylabel="explained variance", title="Reconstruction")
    axes[1].set(xlabel="depth", ylabel="loss recovered", title="Spliced into the model")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    run.figure("dictionary_quality", fig, alt="Explained variance and loss recovered of dictionaries against depth",
               caption="Explained variance (over the whole test set) and share of the loss recovered against zeros: "
               f"masked-LM loss before, the classifier's after fine-tuning. Bands: {over}.")  # fmt: skip


def views(run: Run, cfg: LayerwiseConfig, base: Base, results: Sequence[Result]) -> None:
    """Coloured sentences and the feature browser, both of the first seed."""
    strings = base.tokenizer.tokens
    for r in results:
        rows, examples = r.bench.split.test, r.bench.examples
        tuned = checkpoint.load(run.out / "checkpoints" / r.bench.name / "pre-trained" / f"seed{cfg.seed}").tree
        models = [base.params, tuned]
        params_X = dictionaries.stack([trunk_of(params) for params in models])
        shown, batch = [], examples.filled(rows, 0, ROWS)
        sites = activations.residual_sites(base.model)
        x_RTSD = jax.jit(partial(activations.harvest_models, cfg=base.model, sites=sites))(params_X, batch)
        M = base.model.depths
        a, b = np.asarray(x_RTSD[:, :, :M], np.float64), np.asarray(x_RTSD[:, :, M:], np.float64)
        cosine_RTM = (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-30)
        for at in range(min(6, len(rows))):
            tokens = np.flatnonzero(examples.segment_NT[rows[at]] > 0)[:48]
            words = [strings[i] for i in examples.ids_NT[rows[at]][tokens]]
            name = r.bench.task.classes[examples.label_N[rows[at]]]
            for depth in sorted({M // 2, M - 1}):
                shown.append(Context(words, cosine_RTM[at, tokens, depth].tolist(), f"{name}, depth {depth}"))
        run.sentences(f"change-{r.bench.name}", shown, f"{r.bench.task.name}: cosine of each token's state before and "
                      "after fine-tuning, the middle depth and the last", measure="cosine", limits=(1.0, 0.0),
                      )  # fmt: skip
        run.browser(f"features-{r.bench.name}", feature_groups(run, cfg, base, r, models, strings),
                    f"{r.bench.task.name}: latents of the dictionaries of seed {cfg.seed}, contexts of test texts",
                    )  # fmt: skip


def feature_groups(run: Run, cfg: LayerwiseConfig, base: Base, r: Result, models, strings) -> list[Group]:
    """The latents that tell the labels best, of every depth before and after fine-tuning."""
    bank, found, rows, examples = r.bank, r.found, r.bench.split.test, r.bench.examples
    ids_NT, segment_NT = examples.ids_NT[rows], examples.segment_NT[rows]
    special = excluded(cfg, base)

    @jax.jit
    def codes(params, tree, batch, depth):
        _, acts = transformer.forward(params, batch["ids"], base.model, segment_BT=batch["segment"])
        x_BTD = acts["resid"][depth]
        z_YF = dictionary.encode(tree, x_BTD.reshape(-1, 1, x_BTD.shape[-1]), bank.cfg)
        mask_BT = activations.token_mask(batch, special)
        return jnp.where(mask_BT[:, :, None], z_YF.reshape(*x_BTD.shape[:2], -1), 0.0)

    groups = []
    work = [(after, j) for after in (0, 1) for j in range(len(bank.depths))]
    with Progress(len(work), f"{r.bench.task.name}: contexts", "dictionaries", quiet=run.quiet) as progress:
        for after, j in work:
            m = bank.of(after, 0, j)
            tree = jax.tree.map(lambda leaf, m=m: leaf[m], bank.tree)
            top = evaluate.TopContexts(*(found[f"top_{name}"][m] for name in ("value", "row", "position")))
            alive = np.flatnonzero(found["density_F"][m] > 0)
            latents = np.sort(alive[np.argsort(-found["auroc"][m][alive], kind="stable")][: cfg.browser_latents])

            def codes_of(row_R, after=after, j=j, tree=tree):
                batch = {"ids": ids_NT[row_R], "segment": segment_NT[row_R]}
                return codes(trunk_of(models[after]), tree, batch, bank.depths[j])

            texts = evaluate.contexts(top, ids_NT, segment_NT, strings, 10, codes_of, latents.tolist(), ROWS)
            matched = r.matching[0, j] if after else None
            listed = []
            for f, places in zip(latents.tolist(), texts, strict=True):
                more: dict[str, Any] = {}
                if matched is not None:
                    more["status"] = evaluate.KINDS[matched.kind_E[f]]
                    if matched.index_E[f] >= 0:
                        more |= {"matched": int(matched.index_E[f]), "cosine": float(matched.similarity_E[f])}
                shown = [Context(p["tokens"], p["values"], r.bench.task.classes[examples.label_N[rows[p["row"]]]])
                         for p in places]  # fmt: skip
                listed.append(Feature(
                    f, float(found["density_F"][m][f]), shown, r.bench.task.classes[found["auroc_class"][m][f]],
                    float(found["auroc"][m][f]), float(found["mutual_information"][m][f]), **more,
                ))  # fmt: skip
            name = f"depth {bank.depths[j]}, {'fine-tuned' if after else 'pre-trained'}"
            against = f"depth {bank.depths[j]}, pre-trained" if after else None
            groups.append(Group(name, listed, against))
            progress.update(1)
    return groups


def run_layerwise(run: Run, cfg: LayerwiseConfig) -> None:
    specs = task_specs(cfg.task)
    cfg.dictionary(width=1)  # settings that cannot be are told before anything is trained
    if not cfg.model and any(not spec.startswith("embedded-") for spec in specs):
        raise InputError("real text needs --model (a checkpoint of experiments.apt, or a Hugging Face BERT) and --task")
    base = load_base(run, cfg)
    benches = [load_task(cfg, base, spec) for spec in specs]
    if len({bench.name for bench in benches}) < len(benches):
        raise InputError("--task names two tasks of one name; rename a file")
    depths_of(cfg, base.model.depths)
    for bench in benches:
        check_rows(cfg, base, bench)
    keep_record(run, base, benches)
    results = [study(run, cfg, base, bench) for bench in benches]
    run.write_claims(judge(cfg, results))
    write_tables(run, cfg, results)
    draw(run, cfg, results)
    views(run, cfg, base, results)
    summary = [f"{base.name}."]
    for r in results:
        cosine_M = np.asarray(r.similarity["cosine"]).mean(0)
        summary.append(
            f"{r.bench.task.name}: accuracy {r.accuracy[:, 0].mean():.3f} with a random head, "
            f"{r.accuracy[:, 1].mean():.3f} fine-tuned; cosine {cosine_M[0]:.3f} at the embedding, "
            f"{cosine_M[-1]:.3f} at the last depth; of the latents there "
            f"{r.shares['retained'][:, -1].mean():.0%} retained, {r.shares['new'][:, -1].mean():.0%} new"
            + (
                f" (control: {r.shares['control_retained'][:, -1].mean():.0%}, "
                f"{r.shares['control_new'][:, -1].mean():.0%})."
                if r.bank.control
                else "."
            )
        )
    run.drop_stale()
    report.write(run, "What fine-tuning changes at which depth", "Layer-wise study", summary, PAPER)


if __name__ == "__main__":
    sys.exit(
        cli.main(
            "layerwise",
            LayerwiseConfig,
            PRESETS,
            run_layerwise,
            "How representations change with depth under fine-tuning, and what sparse dictionaries say about it "
            "(arXiv 2502.16722).",
            [
                "python -m experiments.layerwise",
                "python -m experiments.layerwise --preset corrected --model CHECKPOINT --task news.csv,imdb.jsonl",
                "python -m experiments.layerwise --preset faithful --model BERT-FOLDER --task news.csv",
            ],
        )
    )
