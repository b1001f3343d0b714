"""How features are born, turn and die in pre-training (arXiv 2509.17196): one crosscoder over many snapshots.

    python -m experiments.evolution                                                    a demo on generated text
    python -m experiments.evolution --preset small --corpus FOLDER                     the same on real text
    python -m experiments.evolution --preset small --corpus FOLDER --snapshots-from RUN/.../snapshots

Read from top to bottom: settings, text and snapshots, crosscoders, what the held-out text says about them, n-grams and
accuracy along training, baselines and controls, attribution, results, claims, figures, views.

The `paper` preset keeps two choices of ours: inputs are centred, and the straight-through window has width 2 (the
paper's code: 4).

A crosscoder reads one depth of all snapshots of a pre-training run on the same tokens; the decoder norm of a latent at
a snapshot is its strength there. Which loss and gate: RESULTS.md has the planted benchmark that chose the default.
Controls: another start of the crosscoder, every second snapshot only (the others held out), a model with another seed,
one with another warm-up, a dictionary a snapshot, PCA, and random features matched on norm and rate.

Letters beside those of `bert6_jax` and `sae_jax`: H snapshots, which are the heads of a crosscoder; A arms, the
pre-trainings that are compared; K features of a task; X entries of a list of k.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax import checkpoint, lora, metrics, ngrams, objectives, readout, train, transformer
from bert6_jax.config import TransformerConfig, gpt_mini
from bert6_jax.data import pairs as task_pairs
from bert6_jax.data.tokenizer import load_tokenizer
from bert6_jax.data.windows import Windows, steps_per_epoch
from bert6_jax.errors import InputError
from bert6_jax.progress import Progress
from experiments import apt
from experiments.apt import Corpus
from experiments.harness import claims, cli, figures, report
from experiments.harness.browser import Context, Feature, Group
from experiments.harness.claims import Claim
from experiments.harness.cli import option
from experiments.harness.run import Run
from experiments.layerwise import finished_bank, fit_bank, streaming, trunk_of
from sae_jax import activations, attribution, dictionary, evaluate, evolution, features
from sae_jax import train as dictionaries
from sae_jax.activations import Stream
from sae_jax.config import CROSSCODERS, DictionaryConfig, TrainConfig, crosscoder
from sae_jax.losses import Hyper
from synthetic import language
from synthetic import pairs as made_pairs

PAPER = "2509.17196"
ROWS = 32  # texts of one forward pass
later = partial(option, may_change=True)  # of stages after the crosscoders: they may differ in a folder used again
TASKS = ("agreement", "induction", "indirect-object")


@dataclass(frozen=True)
class EvolutionConfig(apt.PretrainConfig):
    """Every setting that can change a result. What the paper leaves open is marked (ours)."""

    objective: str = option("causal", "`causal`: next token; `masked`: BERT", "model", choices=("causal", "masked"))
    snapshots_from: str = option("", "a folder of snapshots step_N of one model (checkpoints of ours); empty: "
                                 "pre-train here", "data")  # fmt: skip
    task: tuple[str, ...] = later(
        ("agreement", "induction"), "tasks for attribution: agreement, induction, indirect-object (generated) or files "
        "of feature-circuits, BLiMP, IOI; several with commas", "data",
    )  # fmt: skip
    control_warmup: float = option(0.3, "warm-up share of one more pre-training (ours); 0: none", "controls", min=0.0,
                                   max=1.0)  # fmt: skip

    steps: tuple[int, ...] = option((), "snapshots that the crosscoder reads, by step; none: all", "crosscoder", min=0)
    depth: int = option(-1, "depth of the residual stream; -1: the middle", "crosscoder", min=-1)
    loss: str = option("batch_topk", "loss and gate (ours; the paper's code: tanh_quad)", "crosscoder",
                       choices=tuple(CROSSCODERS))  # fmt: skip
    latents: int = option(2_048, "latents", "crosscoder", min=1)
    k: int = option(16, "batch_topk: active latents of a token at a snapshot, mean (ours)", "crosscoder", min=1)
    sparsity: float = option(0.3, "tanh_quad, l1: weight of the penalty", "crosscoder", min=0.0)
    crosscoder_lr: float = option(1e-3, "Adam learning rate (ours; the paper: 5e-5)", "crosscoder", min=0.0)
    threshold_lr: float = option(1.0, "tanh_quad: factor on the rate of the thresholds", "crosscoder", min=0.0)
    crosscoder_batch: int = option(1_024, "tokens of a step", "crosscoder", min=1)
    crosscoder_steps: int = option(4_000, "steps", "crosscoder", min=1)
    crosscoder_seeds: int = option(2, "starts; the second is a control", "crosscoder", min=1)
    harvest: str = option("stream", "`stream`: harvested while training; `once`: --buffer tokens, again and again; "
                          "`disk`: --buffer tokens, one snapshot in memory at a time", "crosscoder",
                          choices=("stream", "once", "disk"))  # fmt: skip
    buffer: int = option(32_768, "tokens that are held (stream: of the shuffled buffer)", "crosscoder", min=1)
    dead_after: int = option(500_000, "tokens without firing that make a latent dead", "crosscoder", min=1)
    baselines: bool = later(True, "also one dictionary a snapshot, PCA, and a crosscoder of every second snapshot",
                             "controls")  # fmt: skip

    read_rows: int = option(2_000, "held-out rows that are read", "evaluation", min=2)
    probe_tokens: int = option(4_096, "held-out tokens for probes and regressions", "evaluation", min=16)
    theta: float = option(0.1, "strong match of the token confusion, as in experiments.apt", "evaluation", min=1e-6,
                          max=1.0)  # fmt: skip
    boundary: int = later(0, "step that divides early from late peaks; 0: the square root of the last step (ours; the "
                           "paper's code: 1000 of 143,000)", "evaluation", min=0)  # fmt: skip
    contexts: int = option(6, "top contexts of a latent", "evaluation", min=1)
    browser_latents: int = later(200, "latents in the browser", "evaluation", min=1)

    pairs: int = later(200, "pairs of a task", "attribution", min=8)
    ig_steps: int = later(10, "steps of integrated gradients (ours)", "attribution", min=1)
    baseline: str = later("patched", "baseline of the attribution (ours)", "attribution",
                           choices=attribution.BASELINES)  # fmt: skip
    top_k: tuple[int, ...] = later((1, 2, 5, 10, 20, 50, 100), "numbers of features that are removed, or kept alone",
                                    "attribution", min=1)  # fmt: skip
    draws: int = later(3, "draws of the random control", "attribution", min=1)

    def __post_init__(self):
        super().__post_init__()
        if not self.top_k or 2 * max(self.top_k) > self.latents:
            raise InputError(
                f"--top-k {list(self.top_k)} of {self.latents} latents; give numbers up to half of them, the random "
                "control needs as many others"
            )

    def model(self, vocab_size: int) -> TransformerConfig:
        if self.objective == "masked":
            return super().model(vocab_size)
        masked = super().model(vocab_size)  # checks the widths
        return gpt_mini(
            vocab_size, width=self.width, blocks=self.blocks, heads=self.heads, head_width=masked.head_width,
            mlp_width=self.mlp_width, max_len=self.length, tied=True, dropout=self.dropout,
            attention_dropout=self.dropout, dtype=self.dtype,
        )  # fmt: skip

    def crosscoder(self, width: int, heads: int) -> DictionaryConfig:
        return crosscoder(width, self.latents, heads, self.loss, **({"k": self.k} if self.loss == "batch_topk" else {}))

    def training(self) -> TrainConfig:
        return TrainConfig(
            self.crosscoder_steps, self.crosscoder_batch, lr_floor=1 / 32, threshold_lr=self.threshold_lr,
            dead_after=self.dead_after,
        )  # fmt: skip


PRESETS = {
    "demo": EvolutionConfig(
        documents=5_000, vocab_size=600, subset_sizes=(5_800,), held_out=400, length=40, blocks=4, width=64, heads=4,
        mlp_width=256, dropout=0.0, epochs=5, batch=64, lr=4e-3, schedule="warmup_linear", warmup=0.05, b2=0.98,
        slots=12, dispatch=10, checkpoint_every=2_000, harvest="once", latents=384, k=8, crosscoder_lr=3e-3,
        crosscoder_batch=512, crosscoder_steps=500, ig_steps=20, buffer=32_768, dead_after=50_000, read_rows=400,
        probe_tokens=3_000, pairs=120, top_k=(1, 2, 5, 10, 20, 50), browser_latents=120,
    ),
    "small": EvolutionConfig(
        corpus="", vocab_size=8_000, subset_sizes=(13_000,), held_out=1_247, window="all", length=128, blocks=4,
        width=128, heads=4, mlp_width=512, dropout=0.0, epochs=2, batch=16, lr=2e-3, schedule="warmup_linear",
        warmup=0.05, b2=0.98, snapshots=12, checkpoint_every=250, control_warmup=0.0, task=("",), harvest="once",
        latents=1_024, crosscoder_steps=1_500, buffer=131_072, dead_after=200_000, read_rows=1_000, contexts=5,
    ),
    "paper": EvolutionConfig(
        corpus="", subset_sizes=(90_000,), window="all", length=1_024, blocks=12, width=768, heads=12, mlp_width=3_072,
        dropout=0.0, epochs=1, batch=64, lr=6e-4, schedule="warmup_linear", warmup=0.01, b2=0.95, snapshots=16,
        control_warmup=0.0, task=("",), loss="tanh_quad", threshold_lr=0.1, latents=32_768, crosscoder_lr=5e-5,
        crosscoder_batch=2_048, crosscoder_steps=195_000, crosscoder_seeds=1, buffer=262_144,
        dead_after=10_000_000, baselines=False,
    ),
}  # fmt: skip


# --- text and snapshots ----------------------------------------------------------------------------------------------

# Documents of several sentences on a few topics: a noun comes again, so there is more to know than the last token.
LANGUAGE = language.LanguageConfig(
    topics=4, side_topic=0.1, members=(("subject", 3), ("verb", 3), ("object", 3), ("place", 3)), min_tokens=24
)


def content_words(lang: language.Language) -> list[str]:
    return [word for word, kind in zip(lang.words, lang.kinds, strict=True) if kind == "content"]


def generated_pairs(lang: language.Language, task: str, count: int, seed: int) -> list[task_pairs.PairText]:
    """Pairs of a task that the embedded corpus prepares its models for."""
    if task == "agreement":
        return made_pairs.agreement(lang, count, seed)
    words = content_words(lang)
    if task == "induction":
        return made_pairs.induction(words, count, seed, length=8)
    return made_pairs.indirect_object(words, count, seed, "{X} and {Y} near the {place} , {S} gave the {thing} to",
                                      {"place": words[:6], "thing": words[-6:]})  # fmt: skip


def extra_documents(lang: language.Language, count: int) -> list[str]:
    """Documents that reward copying and keeping two names apart, which no sentence of the language does."""
    made = []
    for number, task in enumerate(("induction", "indirect-object")):
        made += made_pairs.completed(generated_pairs(lang, task, count, 1_000_003 + number))
    return made


class Arm(NamedTuple):
    """One pre-training and its snapshots."""

    name: str
    params: list[Any]  # a tree a snapshot, trunk and head, on the host


class Base(NamedTuple):
    """What the study is of; arm 0 is the one that everything is measured on."""

    corpus: Corpus
    model: TransformerConfig
    steps: tuple[int, ...]
    arms: list[Arm]
    depth: int
    name: str

    @property
    def site(self) -> tuple[activations.Site, TransformerConfig]:
        """The site that crosscoders read, and the model up to there: blocks behind it need not run."""
        return ("resid", self.depth), dataclasses.replace(self.model, blocks=max(self.depth, 1))

    def trunk(self, params: Any) -> Any:
        """The parameters of that part of a model."""
        trunk = trunk_of(params)
        return trunk | {"blocks": jax.tree.map(lambda leaf: leaf[: max(self.depth, 1)], trunk["blocks"])}

    def harvest(self, params_X: Any, batch: Any) -> jax.Array:
        """Activations `[B, T, X, D]` of X models' `trunk`s."""
        site, model = self.site
        return activations.harvest_models(params_X, batch, model, (site,))


def read_snapshots(folder: Path, steps: Sequence[int], tokenizer_sha: str | None) -> tuple[list, tuple, Any]:
    """(trees, steps, configuration) of the snapshots `step_N` of one model.

    Raises:
      InputError: no snapshots, one that is asked for and not there, models of different configurations, another
        vocabulary than that of the text, parameters that are not finite, fewer than two snapshots.
    """
    there = checkpoint.steps(folder)
    if not there:
        raise InputError(f"{folder} holds no snapshots step_N; name the folder `snapshots` of a pre-training run")
    for step in steps:
        if step not in there:
            shown = ", ".join(map(str, there))
            raise InputError(f"{folder} has no snapshot of step {step}; there are {shown}: correct --steps")
    steps = tuple(sorted(set(steps))) or tuple(there)
    if len(steps) < 2:
        raise InputError(f"{folder}: one snapshot has no evolution; give two or more with --steps")
    trees, first = [], None
    for step in steps:
        path = checkpoint.step_path(folder, step)
        params, model, found = checkpoint.load_transformer(path)
        if first is not None and model != first:
            a, b = dataclasses.asdict(first), dataclasses.asdict(model)
            differing = ", ".join(f"{name} {a[name]} and {b[name]}" for name in a if a[name] != b[name])
            raise InputError(f"{path} is of another model than step_{steps[0]:08d} ({differing}); one folder a model")
        first = model
        sha = (found.tokenizer or {}).get("sha256")
        if tokenizer_sha is not None and sha not in (None, tokenizer_sha):
            raise InputError(f"{path} was trained with another vocabulary than the text's; name its own with --vocab")
        params = jax.device_get(params)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            raise InputError(f"{path}: its parameters are not finite (NaN or infinity); leave that step out")
        trees.append(params)
    return trees, steps, first


def load_base(run: Run, cfg: EvolutionConfig) -> Base:
    """Text, and the snapshots of every arm: pre-trained here, or those of `--snapshots-from`."""
    per_task = max(cfg.documents // 8, 1)
    if cfg.snapshots_from:
        folder = Path(cfg.snapshots_from).expanduser()
        vocab = cfg.vocab or next(
            (p / "tokenizer.json" for p in folder.absolute().parents if (p / "tokenizer.json").exists()), None
        )
        if vocab is None:
            raise InputError(f"{folder}: no tokenizer.json in the folders above it; give its vocabulary with --vocab")
        cfg, tokenizer = dataclasses.replace(cfg, vocab=vocab), load_tokenizer(vocab)
        trees, steps, model = read_snapshots(folder, cfg.steps, tokenizer.sha256)
        if model.max_len < cfg.length or model.head == "none" or model.vocab_size != tokenizer.vocab_size:
            raise InputError(
                f"{folder}: {model.max_len} positions, head {model.head}, {model.vocab_size} ids, for rows of "
                f"{cfg.length} and a vocabulary of {tokenizer.vocab_size}; lower --length, or give a language model of "
                "this vocabulary"
            )
        check_depth(cfg, model.blocks)
    corpus = apt.load_corpus(run, cfg, LANGUAGE, partial(extra_documents, count=per_task))
    size, V = max(cfg.subset_sizes), corpus.tokenizer.vocab_size
    if cfg.snapshots_from:
        arms = [Arm("the given snapshots", trees)]
        run.say("the settings of model and pre-training are those of the snapshots; given ones are not used")
        check_text(cfg, Base(corpus, model, steps, arms, 0, ""))
        run.keep_record("snapshots", {"snapshots": lora.fingerprint(trees)})
    else:
        model, mesh, arms, steps = cfg.model(V), apt.mesh_for(cfg.batch), [], ()
        check_text(cfg, Base(corpus, model, steps, arms, 0, ""))
        last = cfg.epochs * steps_per_epoch(corpus.training[size].num_rows, cfg.batch)
        planned = train.log_spaced(last, cfg.snapshots)
        if missing := sorted({*cfg.steps} - {*planned}):
            raise InputError(f"--steps {missing[0]}: snapshots will be at {', '.join(map(str, planned))}; correct it")
        plan = [(f"seed {cfg.seed + s}", cfg.seed + s, cfg.warmup, "") for s in range(cfg.seeds)]
        differs = cfg.schedule == "warmup_linear" and round(last * cfg.warmup) != round(last * cfg.control_warmup)
        if cfg.control_warmup and not differs:
            run.say(f"--control-warmup {cfg.control_warmup:g} would train the same model again; it is left out")
        elif cfg.control_warmup:
            plan.append((f"warm-up {cfg.control_warmup:g}", cfg.seed, cfg.control_warmup, "-warmup"))
        for name, seed, warmup, variant in plan:
            apt.pretrain(run, dataclasses.replace(cfg, warmup=warmup), corpus, mesh, seed, size, variant)
            folder = apt.folder(run, seed, size, f"snapshots{variant}")
            trees, steps, _ = read_snapshots(folder, cfg.steps, corpus.tokenizer.sha256)
            arms.append(Arm(name, trees))
    depth = model.blocks // 2 if cfg.depth < 0 else cfg.depth
    kind = "causal" if model.causal else "masked"
    name = f"{kind} transformer, {model.blocks} blocks of width {model.width}, {len(steps)} snapshots at steps "
    return Base(corpus, model, steps, arms, depth, name + ", ".join(map(str, steps)))


def step_names(base: Base) -> list[str]:
    return [f"{step:,}" for step in base.steps]


def specials(base: Base) -> tuple[int, ...]:
    return tuple(base.corpus.tokenizer.special_ids)


# --- crosscoders -----------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """All dictionaries of the study. Members of `tree`: the crosscoder of arm 0, its other starts, one of each other
    arm. `alone`: a dictionary a snapshot. `half`: the crosscoder of the snapshots `half_H`."""

    cfg: DictionaryConfig
    tree: dictionary.Dictionary  # [members, ...]
    members: list[tuple[str, int]]  # name, arm
    alone: tuple[DictionaryConfig, dictionary.Dictionary] | None
    half: tuple[DictionaryConfig, dictionary.Dictionary] | None
    half_H: np.ndarray
    sample_NHD: np.ndarray  # training tokens of arm 0: PCA and regressions are fitted on them


def even_snapshots(H: int) -> np.ndarray:
    """Every second snapshot, first and last included."""
    return np.unique([*range(0, H, 2), H - 1])


def check_settings(cfg: EvolutionConfig) -> None:
    """Refuse settings that cannot be before any text is read."""
    cfg.model(vocab_size=100)
    cfg.crosscoder(width=1, heads=2)
    if cfg.pack:
        raise InputError("--pack: crosscoders read one article a row, whose positions begin at 0; leave it out")
    if not cfg.snapshots_from:
        check_depth(cfg, cfg.blocks)
    if len({*cfg.steps}) == 1:
        raise InputError(f"--steps {cfg.steps[0]}: one snapshot has no evolution; give two or more")
    need = cfg.crosscoder_batch + ROWS * cfg.length
    if cfg.buffer < need:
        raise InputError(
            f"--buffer {cfg.buffer} does not hold a batch of {cfg.crosscoder_batch} and {ROWS} texts of {cfg.length} "
            f"positions; give {need} or more"
        )
    files = [spec for spec in cfg.task if spec and spec not in TASKS]
    for spec in cfg.task:
        if spec in TASKS and cfg.corpus != "embedded":
            raise InputError(f"--task {spec} is made of the embedded corpus; with real text name a file of pairs")
    names = [spec if spec in TASKS else Path(spec).stem for spec in cfg.task if spec]
    if len(set(names)) < len(names):
        raise InputError("--task names two tasks of one name; rename a file")
    for spec in files:
        if not Path(spec).expanduser().exists():
            raise InputError(f"--task {spec}: no such file, and none of {', '.join(TASKS)}")
        task_pairs.read_pairs(spec)


def check_depth(cfg: EvolutionConfig, blocks: int) -> None:
    if cfg.depth > blocks:
        raise InputError(f"--depth {cfg.depth}: this model has the depths 0 to {blocks}")


def check_text(cfg: EvolutionConfig, base: Base) -> None:
    """Refuse text and tasks that cannot be used before any model is trained."""
    rows = base.corpus.training[max(cfg.subset_sizes)]
    if rows.num_tokens < cfg.crosscoder_batch:
        raise InputError(
            f"{rows.num_tokens} training tokens do not fill --crosscoder-batch {cfg.crosscoder_batch}; give a smaller "
            "one, or more text"
        )
    held = base.corpus.held_out
    articles = np.unique(held.document_W[held_out_rows(cfg, held)])
    if len(articles) < 2:
        raise InputError(
            "one held-out article is read; kinds of features need two halves: raise --held-out, --read-rows"
        )
    load_tasks(cfg, base)


def harvest(run: Run, cfg: EvolutionConfig, base: Base):
    """What a train step reads: (state of the inputs, frozen arrays, inputs, batch_at), and some training tokens
    `[N, S, D]` to look at. Sites are all snapshots of all arms, side by side on the same tokens."""
    windows, (name, model) = base.corpus.training[max(cfg.subset_sizes)], base.site
    stream = Stream(
        model, (name,), rows=ROWS, batch=cfg.crosscoder_batch, capacity=cfg.buffer, exclude=specials(base)
    )  # fmt: skip
    order = np.random.default_rng(cfg.seed).permutation(windows.num_rows)
    # as many rows as can be read, and no more: the whole text need not lie on the device
    wanted = cfg.crosscoder_steps * cfg.crosscoder_batch * 2 if cfg.harvest == "stream" else cfg.buffer * 2
    batch = windows.batch(order[: max(ROWS, -(-wanted // cfg.length))])
    if cfg.harvest == "disk":
        ends = np.cumsum(np.asarray(activations.token_mask(batch, specials(base))).sum(1))
        enough = np.searchsorted(ends, cfg.buffer, side="right")  # rows whose tokens are --buffer or fewer
        batch, parts = {name: leaf[:enough] for name, leaf in batch.items()}, []
        for a, arm in enumerate(base.arms):
            for step, params in zip(base.steps, arm.params, strict=True):
                folder = run.out / "checkpoints" / "activations" / f"arm{a}-step{step}"
                run.say(f"harvest {arm.name}, step {step:,}")
                shards = activations.write_shards(
                    folder, dictionaries.stack([base.trunk(params)]), model, (name,), batch["ids"], batch["segment"],
                    description={"arm": arm.name, "step": step}, rows=ROWS, exclude=specials(base),
                )  # fmt: skip
                parts.append(shards)
        joined = activations.join_shards(parts)
        at = np.random.default_rng(cfg.seed).permutation(joined.num_rows)[: min(joined.num_rows, 16_384)]
        return {}, None, activations.given, joined.batch_at(cfg.seed, cfg.crosscoder_batch), joined.rows(np.sort(at))
    params_X = dictionaries.stack([base.trunk(params) for arm in base.arms for params in arm.params])
    tokens = activations.token_rows(batch["ids"], batch["segment"], np.arange(len(batch["ids"])))
    source, frozen = activations.open_stream(stream, params_X, tokens, cfg.seed)
    x_NSD = source["x"][: int(source["count"])]
    if cfg.harvest == "stream":
        return source, frozen, streaming(stream), activations.no_batch, x_NSD[:16_384]
    rows_at = activations.row_batches(cfg.seed, len(x_NSD), cfg.crosscoder_batch)
    return {}, {"x": x_NSD}, activations.resident, rows_at, x_NSD[:16_384]


def train_crosscoders(run: Run, cfg: EvolutionConfig, base: Base) -> Trained:
    """All of them read the same rows: every snapshot of every arm on the same tokens."""
    H, A = len(base.steps), len(base.arms)
    source, frozen, inputs, batch_at, x_NSD = harvest(run, cfg, base)
    cross_cfg, train_cfg = cfg.crosscoder(base.model.width, H), cfg.training()
    hyper = Hyper(lr=cfg.crosscoder_lr, k=cfg.k, sparsity=cfg.sparsity)

    def fit(name: str, dict_cfg: DictionaryConfig, sites_GH: np.ndarray, seeds: Sequence[int], about: list[str]):
        path = run.out / "checkpoints" / name
        if path.exists():
            return finished_bank(path, dict_cfg, len(sites_GH))

        @jax.jit
        def begin(key, x_NHD):
            norm = dictionary.fit_norm(x_NHD, dict_cfg)
            y_NHD, _ = dictionary.normalise(norm, x_NHD[:1_024], dict_cfg)
            return norm, dictionary.search_norm(dictionary.init(key, dict_cfg), y_NHD, dict_cfg)[0]

        starts = [
            begin(jax.random.fold_in(jax.random.key(seed), 70_003), x_NSD[:, sites])
            for seed, sites in zip(seeds, sites_GH, strict=True)
        ]
        norms, params = (dictionaries.stack([start[i] for start in starts]) for i in (0, 1))
        state = dictionaries.init_state(
            jax.random.key(cfg.seed), dict_cfg, train_cfg, [hyper] * len(sites_GH), norms, params=params,
            sites=sites_GH, source=source,
        )  # fmt: skip
        return fit_bank(
            run, path, state, dict_cfg, train_cfg, inputs, batch_at, frozen, stage=name,
            label=f"{len(sites_GH)} x {name}, {dict_cfg.heads} snapshot(s)", checkpoint_every=1_000,
            extra={"members": about, "steps": list(base.steps), "depth": base.depth},
        )  # fmt: skip

    all_H = np.arange(H)
    members = [(f"start {g}", 0) for g in range(cfg.crosscoder_seeds)]
    members += [(base.arms[a].name, a) for a in range(1, A)]
    seeds = [*range(cfg.seed, cfg.seed + cfg.crosscoder_seeds), *[cfg.seed] * (A - 1)]
    sites = np.stack([arm * H + all_H for _, arm in members])
    tree = fit("crosscoder", cross_cfg, sites, seeds, [name for name, _ in members])
    alone = half = None
    half_H = even_snapshots(H)
    if cfg.baselines:
        one_cfg = cfg.crosscoder(base.model.width, 1)
        alone = one_cfg, fit("dictionaries", one_cfg, all_H[:, None], [cfg.seed] * H, step_names(base))
        if len(half_H) < H:
            half_cfg = cfg.crosscoder(base.model.width, len(half_H))
            half = half_cfg, fit("crosscoder-half", half_cfg, half_H[None], [cfg.seed], ["every second snapshot"])
    return Trained(cross_cfg, tree, members, alone, half, half_H, np.asarray(x_NSD[:8_192, :H]))


def member_of(tree, g: int):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[g]), tree)


# --- what the held-out text says -------------------------------------------------------------------------------------


def held_out_rows(cfg: EvolutionConfig, windows: Windows) -> np.ndarray:
    """Rows to read, spread over the held-out articles."""
    count = min(cfg.read_rows, windows.num_rows)
    return np.unique(np.linspace(0, windows.num_rows - 1, count).astype(np.int64))


def filled(windows: Windows, rows: np.ndarray, begin: int, size: int = ROWS) -> dict[str, np.ndarray]:
    """A batch of `size` rows; those beyond the end repeat the last one and are not valid."""
    at = np.arange(begin, begin + size)
    return windows.batch(rows[np.minimum(at, len(rows) - 1)], at < len(rows))


def read_crosscoder(run: Run, cfg: EvolutionConfig, base: Base, trained: Trained) -> dict[str, np.ndarray]:
    """Everything that the held-out text says about the crosscoder of arm 0: fidelity, rates, presence, kinds, probes,
    top contexts at every snapshot."""
    H, F, D = len(base.steps), cfg.latents, base.model.width
    windows, dict_cfg = base.corpus.held_out, trained.cfg
    rows = held_out_rows(cfg, windows)
    tree = member_of(trained.tree, 0)
    params_X = dictionaries.stack([base.trunk(params) for params in base.arms[0].params])
    path = evolution.trajectories(tree["params"]["W_dec"], tree["norm"]["scale"])
    peak_F = evolution.peak_snapshot(path.norm_HF)
    W_HFD, b_HD, exclude = tree["params"]["W_dec"], tree["params"]["b_dec"], specials(base)

    @jax.jit
    def look(params_X, batch):
        x_RTHD = base.harvest(params_X, batch)
        mask_RT = activations.token_mask(batch, exclude)
        R, T = mask_RT.shape
        x_YHD, mask_Y = x_RTHD.reshape(R * T, H, D), mask_RT.reshape(-1)
        xhat_YHD, z_YF = dictionary.reconstruct(tree, x_YHD, dict_cfg)
        at_head = partial(dictionary.at_head, tree, z_YF, dict_cfg)
        y_YHD, _ = dictionary.normalise(tree["norm"], x_YHD, dict_cfg)
        yhat_YHD, _ = dictionary.normalise(tree["norm"], xhat_YHD, dict_cfg)
        sums = evolution.code_sums(at_head, mask_Y, H)
        scaled = evolution.scaling_sums(at_head, y_YHD - b_HD[None], yhat_YHD - b_HD[None], W_HFD, peak_F, mask_Y)
        peak_YF = jnp.where(mask_Y[:, None], evolution.peak_codes(at_head, peak_F, H), 0.0)
        stats = evaluate.stats_of(x_YHD, xhat_YHD, z_YF, mask_Y)
        return stats, (sums, scaled), peak_YF.reshape(R, T, F), z_YF.reshape(R, T, F), y_YHD, mask_RT

    @jax.jit
    def top_of(tops, z_RTF, row_R, mask_RT):
        def one(h, top):
            f_YF = dictionary.at_head(tree, z_RTF.reshape(-1, F), dict_cfg, h)
            return evaluate.top_update(top, f_YF.reshape(z_RTF.shape), row_R, mask_RT)

        return jax.lax.map(lambda args: one(*args), (jnp.arange(H, dtype=jnp.int32), tops))

    add = jax.jit(lambda a, b: (evaluate.add(a[0], b[0]), jax.tree.map(jnp.add, a[1], b[1])))
    V = base.model.vocab_size
    counts = features.start(F, V + 1 if F * V < 2**25 else 2**13, 2**14)
    tops = jax.vmap(lambda _: evaluate.top_init(F, cfg.contexts))(jnp.arange(H))
    # the articles that are read, by turns, so that no article is in both halves
    half_N = np.unique(windows.document_W[rows], return_inverse=True)[1] % 2
    total, kept = None, []
    with Progress(len(rows), "read the crosscoder", "rows", quiet=run.quiet) as progress:
        for begin in range(0, len(rows), ROWS):
            batch = filled(windows, rows, begin)
            stats, sums, peak_RTF, z_RTF, y_YHD, mask_RT = look(params_X, batch)
            total = (stats, sums) if total is None else add(total, (stats, sums))
            half_R = np.full(ROWS, -1, np.int32)
            half_R[: len(half_N[begin : begin + ROWS])] = half_N[begin : begin + ROWS]
            counts = features.update(counts, peak_RTF, batch["ids"], batch["segment"], mask_RT, half_R)
            tops = top_of(tops, z_RTF, jnp.arange(begin, begin + ROWS, dtype=jnp.int32), mask_RT)
            if sum(map(len, (y for y, _ in kept))) < cfg.probe_tokens:
                use = np.flatnonzero(np.asarray(mask_RT).reshape(-1))
                kept.append((np.asarray(y_YHD)[use], np.asarray(peak_RTF.reshape(-1, F) > 0)[use]))
            progress.update(min(ROWS, len(rows) - begin))
    stats, (sums, scaled) = jax.device_get(total)
    found = {name: np.asarray(value) for name, value in evaluate.summary(stats).items()}
    rates = evolution.rates(sums)
    found |= {"rate_HF": rates.rate_HF, "mean_HF": rates.mean_HF, "peak_F": peak_F}
    for direction in ("peak", "turned"):
        beta = evolution.scaling(scaled, W_HFD, peak_F, direction)
        found |= {f"{direction}_{name}": value for name, value in beta._asdict().items()}
    y_NHD, fires_NF = (np.concatenate([part[i] for part in kept])[: cfg.probe_tokens] for i in (0, 1))
    found["auc_HF"] = evolution.separability(y_NHD - np.asarray(b_HD)[None], W_HFD, fires_NF)
    found |= {f"kind_{name}": np.asarray(value) for name, value in features.types(counts).items()}
    found |= {f"top_{name}": np.asarray(leaf) for name, leaf in zip(("value", "row", "position"), tops, strict=True)}
    return found | {"rows": rows}


def held_out_tokens(cfg: EvolutionConfig, base: Base, arm: int) -> np.ndarray:
    """Raw activations of held-out tokens, `[N, H, D]`, N up to `probe_tokens`."""
    params_X = dictionaries.stack([base.trunk(params) for params in base.arms[arm].params])
    run_models = jax.jit(base.harvest)
    windows, found, count = base.corpus.held_out, [], 0
    rows = held_out_rows(cfg, windows)
    for begin in range(0, len(rows), ROWS):
        batch = filled(windows, rows, begin)
        mask_RT = np.asarray(activations.token_mask(batch, specials(base)))
        found.append(np.asarray(run_models(params_X, {name: batch[name] for name in ("ids", "segment")}))[mask_RT])
        count += len(found[-1])
        if count >= cfg.probe_tokens:
            break
    return np.concatenate(found)[: cfg.probe_tokens]


# --- n-grams and accuracy along training -----------------------------------------------------------------------------


def along_training(run: Run, cfg: EvolutionConfig, base: Base) -> dict[str, np.ndarray]:
    """Of every arm and snapshot, on held-out text: loss, divergences from unigrams and bigrams both ways, accuracy per
    token and its clusters; and the n-grams' entropies. Leading axes [A, H]."""
    windows, model, corpus = base.corpus.training[max(cfg.subset_sizes)], base.model, base.corpus
    exclude, V = specials(base), base.model.vocab_size

    def counted(windows: Windows, rows: np.ndarray) -> ngrams.Counts:
        total = None
        for begin in range(0, len(rows), 4_096):
            batch = windows.batch(rows[begin : begin + 4_096])
            part = ngrams.count(batch["ids"], batch["segment"], V, exclude)
            total = part if total is None else ngrams.add(total, part)
        return total

    counts = counted(windows, np.arange(windows.num_rows))
    model_of = ngrams.fit(counts)
    masking = None if model.causal else apt.evaluation_masking(corpus)
    held = corpus.held_out
    rows = held_out_rows(cfg, held)
    params_AX = dictionaries.stack([p for arm in base.arms for p in arm.params])
    diverge = jax.jit(partial(ngrams.divergence_sums, cfg=model, masking=masking))

    @jax.jit
    def answers(params_AX, batch, key):
        """(predictions [AX, B, K], targets, valid)"""
        if masking is not None:

            def one(params):
                prediction, _, corrupted = readout.predict(params, None, batch, key, model, masking, None)
                return prediction[0], corrupted.target_BK, corrupted.valid_BK
        else:

            def one(params):
                out_BTD, _ = transformer.forward(params, batch["ids"], model, **objectives.forward_inputs(batch))
                logits = transformer.head(params, out_BTD[:, :-1], model)
                segment_BT = batch["segment"]
                valid = (segment_BT[:, 1:] > 0) & (segment_BT[:, 1:] == segment_BT[:, :-1]) & batch["valid"][:, None]
                return jnp.argmax(logits, -1).astype(jnp.int32), batch["ids"][:, 1:], valid

        return jax.lax.map(one, params_AX)

    size = 8 if V > 2_000 else ROWS  # rows: a model's logits are [rows, T, V]
    total, parts = None, []
    with Progress(len(rows), "n-grams and accuracy", "rows", quiet=run.quiet) as progress:
        for begin in range(0, len(rows), size):
            batch = filled(held, rows, begin, size)
            key = None if masking is None else jax.random.fold_in(jax.random.key(80_021), begin)
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), diverge(params_AX, batch, model_of, key=key))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
            prediction, target, valid = jax.device_get(answers(params_AX, batch, key))
            parts.append((prediction[:, valid[0]], target[0][valid[0]]))
            progress.update(min(size, len(rows) - begin))
    found = ngrams.divergences(total)
    target_X = np.concatenate([t for _, t in parts])
    use_X = corpus.include_V[target_X]
    apt_of, clustered = [], []
    for prediction_X in np.concatenate([p for p, _ in parts], axis=1):
        mode_X = jnp.zeros(use_X.shape, jnp.int32)
        tokens = metrics.count_tokens(jnp.asarray(target_X), jnp.asarray(prediction_X), mode_X, jnp.asarray(use_X), V)
        apt_of.append(float(metrics.macro_apt(tokens, jnp.asarray(corpus.include_V), 1, None).mean))
        matrix = metrics.count_confusion(target_X, prediction_X, use_X, V)
        matches = metrics.strong_matches(matrix, V, cfg.theta)
        stats = metrics.cluster_stats(matches, metrics.clusters(matches, cfg.theta), cfg.theta)
        clustered.append([int(stats.kept), int(stats.kept) - int(stats.singletons)])
    shape = (len(base.arms), len(base.steps))
    out = {name: np.asarray(value).reshape(shape) for name, value in found.items() if np.ndim(value)}
    out |= {"apt": np.array(apt_of).reshape(shape), "kept": np.array(clustered)[:, 0].reshape(shape),
            "clustered": np.array(clustered)[:, 1].reshape(shape)}  # fmt: skip
    out |= {f"entropy_{name}": np.float64(value) for name, value in ngrams.entropies(counts).items()}
    held_counts = counted(held, rows)
    return out | {f"floor_{name}": np.float64(v) for name, v in ngrams.cross_entropies(model_of, held_counts).items()}


# --- baselines and controls ------------------------------------------------------------------------------------------


def explained(x_NHD: np.ndarray, xhat_NHD: np.ndarray) -> np.ndarray:
    """1 - error / variance of every snapshot, `[H]` float64, by their own means."""
    error_H = np.square(x_NHD - xhat_NHD, dtype=np.float64).sum((0, 2))
    return 1.0 - error_H / np.square(x_NHD - x_NHD.mean(0), dtype=np.float64).sum((0, 2))


def compare_baselines(cfg: EvolutionConfig, base: Base, trained: Trained) -> dict[str, np.ndarray]:
    """Explained variance of every snapshot on held-out tokens: every crosscoder, a dictionary a snapshot, PCA of the
    snapshots side by side and of each, a linear map from the last snapshot, and, for snapshots that `half` has never
    seen, a linear map from its codes. Linear fits are on training tokens."""
    H, arm_of = len(base.steps), [arm for _, arm in trained.members]
    test = {arm: held_out_tokens(cfg, base, arm) for arm in sorted(set(arm_of))}
    x_NHD = test[0]
    run_one = jax.jit(dictionary.reconstruct, static_argnums=2)
    found: dict[str, list] = {"members": [], "l0": [], "fires": []}

    def l0_of(tree, dict_cfg, z_NF):
        heads = range(dict_cfg.heads)
        return [float((dictionary.at_head(tree, z_NF, dict_cfg, h) != 0).sum(-1).mean()) for h in heads]

    for g, arm in enumerate(arm_of):
        tree = member_of(trained.tree, g)
        xhat, z_NF = run_one(tree, test[arm], trained.cfg)
        found["members"].append(explained(test[arm], np.asarray(xhat)))
        found["l0"].append(l0_of(tree, trained.cfg, z_NF))
        found["fires"].append(np.asarray((z_NF != 0).any(0)))
    out = {name: np.array(value) for name, value in found.items()}

    sample, mean_HD = trained.sample_NHD.astype(np.float64), trained.sample_NHD.mean(0, dtype=np.float64)
    test_c, fit_c = x_NHD - mean_HD, sample - mean_HD
    k = max(1, round(float(out["l0"][0].mean())))
    out["pca_k"] = np.int64(k)

    def pca(fit_ND, test_ND, k):
        _, vectors = np.linalg.eigh(fit_ND.T @ fit_ND)
        top = vectors[:, -k:]
        return test_ND @ top @ top.T

    def of_snapshot(h: int, xhat_ND: np.ndarray) -> float:
        return explained(test_c[:, [h]], xhat_ND[:, None])[0]

    N, _, D = x_NHD.shape
    joint = pca(fit_c.reshape(len(fit_c), -1), test_c.reshape(N, -1), k).reshape(N, H, D)
    out["pca_joint"] = explained(test_c, joint)
    out["pca_each"] = np.array([of_snapshot(h, pca(fit_c[:, h], test_c[:, h], k)) for h in range(H)])
    last = [linear(fit_c[:, -1], fit_c[:, h], test_c[:, -1]) for h in range(H)]
    out["from_last"] = np.array([of_snapshot(h, xhat_ND) for h, xhat_ND in enumerate(last)])
    if trained.alone is not None:
        alone_cfg, alone = trained.alone
        evs, l0s = [], []
        for h in range(H):
            tree = member_of(alone, h)
            xhat, z_NF = run_one(tree, x_NHD[:, [h]], alone_cfg)
            evs.append(explained(x_NHD[:, [h]], np.asarray(xhat))[0])
            l0s += l0_of(tree, alone_cfg, z_NF)
        out |= {"alone": np.array(evs), "alone_l0": np.array(l0s)}
    if trained.half is not None:
        half_cfg, half = trained.half
        tree, seen = member_of(half, 0), trained.half_H
        z_test, z_fit = (np.asarray(run_one(tree, jnp.asarray(x[:, seen], jnp.float32), half_cfg)[1], np.float64)
                         for x in (x_NHD, sample))  # fmt: skip
        out["half_fires"] = (z_test != 0).any(0)
        full = member_of(trained.tree, 0)
        w_test, w_fit = (np.asarray(run_one(full, jnp.asarray(x, jnp.float32), trained.cfg)[1], np.float64)
                         for x in (x_NHD, sample))  # fmt: skip
        held = np.setdiff1d(np.arange(H), seen)
        for name, fit, test_codes in (("held_out", z_fit, z_test), ("held_out_seen", w_fit, w_test)):
            out[name] = np.array([of_snapshot(h, linear(fit, fit_c[:, h], test_codes)) for h in held])
        near = []
        for h in held:  # what both neighbours tell without any crosscoder
            sides = [np.concatenate([x[:, h - 1], x[:, h + 1]], axis=1) for x in (fit_c, test_c)]
            near.append(of_snapshot(h, linear(sides[0], fit_c[:, h], sides[1])))
        out |= {"held_out_H": held, "held_out_neighbours": np.array(near)}
    return out


def linear(fit_NX: np.ndarray, fit_ND: np.ndarray, test_NX: np.ndarray) -> np.ndarray:
    """Ridge regression with a small ridge (1e-3 of the mean variance), intercept included."""
    mean_X, mean_D = fit_NX.mean(0), fit_ND.mean(0)
    centred = fit_NX - mean_X
    gram = centred.T @ centred
    ridge = 1e-3 * max(np.trace(gram) / len(gram), 1e-12)
    weights = np.linalg.solve(gram + ridge * np.eye(len(gram)), centred.T @ (fit_ND - mean_D))
    return (test_NX - mean_X) @ weights + mean_D


class Turning(NamedTuple):
    """Trajectories of one crosscoder, on the host."""

    norm_HF: np.ndarray
    strength_HF: np.ndarray
    rotation_IF: np.ndarray
    turned_IF: np.ndarray
    turn: evolution.TurningPoint
    turn_log: evolution.TurningPoint  # a unit of log step
    birth_F: np.ndarray  # first snapshot whose norm is above half of its largest


def path_of(tree, steps: Sequence[int], fires_F: np.ndarray, seed: int = 0) -> tuple[evolution.Trajectories, Turning]:
    """Trajectories of all latents, and when those that fire turn."""
    path = jax.device_get(
        evolution.trajectories(jnp.asarray(tree["params"]["W_dec"]), jnp.asarray(tree["norm"]["scale"]))
    )
    use = path.turned_IF & (path.strength_HF[1:] > 0.1) & (path.strength_HF[:-1] > 0.1) & fires_F[None]
    if not use.any():
        use = path.turned_IF
    turns = [evolution.turning_point(path.rotation_IF, steps, use_IF=use, per_log_step=log, seed=seed)
             for log in (False, True)]  # fmt: skip
    birth_F = np.argmax(path.strength_HF > 0.5, axis=0)
    return path, Turning(path.norm_HF, path.strength_HF, path.rotation_IF, use, *turns, birth_F)


def agreement_of(
    a_HFD: np.ndarray, b_HFD: np.ndarray, alive_a, alive_b, birth_a, birth_b, steps, least: float = 0.7
) -> dict[str, float]:
    """Two crosscoders of the same snapshots: share of the second one's latents that fire and match one of the first,
    one to one, by the cosine of decoders laid end to end; and how far apart (in snapshots and in doublings) the births
    of the matched ones are."""
    laid = [np.moveaxis(np.asarray(v), 0, 1).reshape(v.shape[1], -1) for v in (a_HFD, b_HFD)]
    matching = evaluate.match(*laid, alive_F=alive_a, alive_E=alive_b)
    good = np.flatnonzero(np.nan_to_num(matching.similarity_E) >= least)
    if not len(good):
        return {"matched": 0.0, "birth_near": float("nan"), "birth_doublings": float("nan")}
    a, b = birth_a[matching.index_E[good]], birth_b[good]
    log = np.log2(1.0 + np.asarray(steps, np.float64))
    return {"matched": len(good) / int(alive_b.sum()), "birth_near": float((np.abs(a - b) <= 1).mean()),
            "birth_doublings": float(np.median(np.abs(log[a] - log[b])))}  # fmt: skip


# --- attribution -----------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    name: str
    choose: task_pairs.Pairs  # features are chosen on these
    score: task_pairs.Pairs  # and scored on these


def load_tasks(cfg: EvolutionConfig, base: Base, say=lambda line: None) -> list[Task]:
    tasks = []
    for spec in cfg.task:
        if not spec:
            continue
        if spec in TASKS:
            rows, name = generated_pairs(base.corpus.lang, spec, cfg.pairs, cfg.seed + 17), spec
        else:
            rows, name = task_pairs.read_pairs(spec), Path(spec).stem
        encoded = task_pairs.encode_pairs(
            base.corpus.tokenizer, rows, name, masked=not base.model.causal, length=None, limit=cfg.pairs, seed=cfg.seed
        )
        if encoded.clean_NT.shape[1] > base.model.max_len:
            raise InputError(f"{spec}: rows of {encoded.clean_NT.shape[1]} tokens for a model of {base.model.max_len}")
        dropped = ", ".join(f"{count} {why}" for why, count in encoded.dropped.items()) or "none"
        say(f"task {name}: {len(encoded.right_N)} pairs; dropped: {dropped}")
        tasks.append(Task(name, *task_pairs.split_pairs(encoded, cfg.seed)))
    return tasks


def batch_of(pairs: task_pairs.Pairs, model: TransformerConfig, begin: int, size: int) -> attribution.Pairs:
    at = np.arange(begin, begin + size)
    row = np.minimum(at, len(pairs.right_N) - 1)
    fields = (pairs.clean_NT, pairs.patch_NT, pairs.segment_NT, pairs.position_N, pairs.right_N, pairs.wrong_N)
    return attribution.check_pairs(attribution.Pairs(*(leaf[row] for leaf in fields), at < len(pairs.right_N)), model)


def attribution_stage(cfg: EvolutionConfig, tasks: Sequence[Task]) -> str:
    """A name with a digest of what the stage depends on: other tasks and settings are other stages."""
    digest = hashlib.sha256(repr((cfg.ig_steps, cfg.baseline, cfg.top_k, cfg.draws)).encode())
    for task in tasks:
        for part in (task.choose, task.score):
            for leaf in (part.clean_NT, part.patch_NT, part.position_N, part.right_N, part.wrong_N):
                digest.update(np.ascontiguousarray(leaf).tobytes())
        digest.update(task.name.encode())
    return f"attribution-{digest.hexdigest()[:10]}"


def attribute_tasks(run: Run, cfg: EvolutionConfig, base: Base, trained: Trained, tasks: Sequence[Task], rate_HF):
    """Of every task and snapshot: the metric, attributions (integrated gradients, attribution patching), necessity and
    sufficiency of the chosen features and of their random controls; and each task's features removed from the others.
    """
    H, F = len(base.steps), cfg.latents
    tree, dict_cfg, size = member_of(trained.tree, 0), trained.cfg, 32
    params_H = dictionaries.stack(base.arms[0].params)
    raw_norm_HF = np.asarray(jnp.linalg.norm(tree["params"]["W_dec"], axis=-1) / tree["norm"]["scale"][:, None])
    k_X = np.array(cfg.top_k, np.int32)
    K = int(k_X.max())
    # [MASK] too: crosscoders are trained on whole text, so what is there counts as error
    exclude = jnp.asarray(specials(base))

    def over(pairs, fn, extra_H=None):
        """Means over all pairs, `fn(metric, ends, extra)` a batch and snapshot."""
        total = None
        for begin in range(0, len(pairs.right_N), size):
            part = fn(batch_of(pairs, base.model, begin, size), extra_H)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        return attribution.means(total)

    def snapshots(fn):
        def run_batch(batch, extra_H):
            def one(metric, ends, extra):
                return attribution.totals(fn(metric, ends, extra), batch.valid_B)

            use_BT = ~jnp.isin(batch.clean_BT, exclude)
            return attribution.per_snapshot(one, tree, dict_cfg, params_H, base.model, batch, base.depth, extra_H,
                                            baseline=cfg.baseline, use_BT=use_BT)  # fmt: skip

        return jax.jit(run_batch)

    def effects(metric, ends, _):
        found = attribution.attribute(metric, ends, "gauss", cfg.ig_steps)
        first = attribution.attribute(metric, ends, "gradient", 1)
        right_B = (found.clean > 0).astype(jnp.float32)
        return found, first.features, attribution.gap(found), right_B

    def curve(metric, ends, rank_F):
        return attribution.curves(metric, ends, rank_F, jnp.asarray(k_X))

    effects_of, curves_of = snapshots(effects), snapshots(curve)
    found: dict[str, np.ndarray] = {}
    ranked = []
    with np.errstate(divide="ignore"):
        log_norm_HF, log_rate_HF = np.log(raw_norm_HF), np.log(rate_HF)
    fires_HF = np.isfinite(log_norm_HF) & np.isfinite(log_rate_HF)
    fewest = int(fires_HF.sum(1).min())
    if K > fewest // 2:  # the random control needs as many others
        remedy = f"give numbers up to {fewest // 2}" if fewest > 1 else "train the crosscoder longer"
        raise InputError(f"--top-k {K}: at one snapshot {fewest} latent(s) fire, half can be chosen; {remedy}")
    for task in tasks:
        with Progress(H, f"attribution: {task.name}", "snapshots", quiet=run.quiet) as progress:
            (mean, first_HF, gap_H, right_H), _ = over(task.choose, effects_of)
            score_HF = np.where(fires_HF, np.abs(mean.features), -1.0)
            chosen_HK = attribution.top(score_HF, K)
            rank_HF = jnp.asarray(attribution.ranks(chosen_HK, F))
            own, own_se = over(task.score, curves_of, rank_HF)
            controls = [attribution.matched_random(h, chosen_HK[h], log_norm_HF[h], log_rate_HF[h], draws=cfg.draws)
                        for h in range(H)]  # fmt: skip
            drawn, drawn_se = zip(
                *(over(task.score, curves_of,
                       jnp.asarray(attribution.ranks(np.stack([c.index_RK[r] for c in controls]), F)))
                  for r in range(cfg.draws)), strict=True
            )  # fmt: skip
            progress.update(H)
        ranked.append(rank_HF)
        # of the difference of two means over the same pairs: both errors, as if they were independent (they add up)
        span_H1 = np.abs(own.full - own.empty)[:, None]
        random_se_HX = np.mean([se.necessity for se in drawn_se], axis=0)
        error_HX = np.hypot(own_se.necessity, random_se_HX) / np.where(span_H1 > 0, span_H1, np.nan)
        necessity_HX, sufficiency_HX = attribution.faithfulness(own)
        both = [attribution.faithfulness(d) for d in drawn]
        random_n, random_s = (np.stack([pair[i] for pair in both]) for i in (0, 1))
        mine = {
            "attribution_HF": mean.features, "patching_HF": first_HF, "error_H": mean.error, "clean_H": mean.clean,
            "base_H": mean.base, "gap_H": gap_H, "right_H": right_H, "chosen_HK": chosen_HK,
            "necessity_HX": necessity_HX, "sufficiency_HX": sufficiency_HX, "random_necessity_RHX": random_n,
            "random_sufficiency_RHX": random_s, "score_clean_H": own.clean, "score_base_H": own.base,
            "necessity_se_HX": error_HX, "score_clean_se_H": own_se.clean,
            "norm_gap_H": np.array([np.abs(c.norm_RK).mean() for c in controls]),
            "rate_gap_H": np.array([np.abs(c.rate_RK).mean() for c in controls]),
            "relative_HF": np.asarray(evolution.relative(mean.features).share),
        }  # fmt: skip
        found |= {f"{task.name}_{name}": np.asarray(value) for name, value in mine.items()}
    if len(tasks) > 1:  # what removing the features of task i costs task j, at the last snapshot
        cost_XX = np.zeros((len(tasks), len(tasks)))
        at = int(np.flatnonzero(k_X == min(k_X, key=lambda k: abs(k - 10)))[0])
        for i, rank_HF in enumerate(ranked):
            for j, task in enumerate(tasks):
                other, _ = over(task.score, curves_of, rank_HF)
                cost_XX[i, j] = 1.0 - attribution.faithfulness(other)[0][-1, at]
        found |= {"cost_XX": cost_XX, "cost_k": np.int64(k_X[at])}
        if np.isfinite(cost_XX).all():
            found["specificity_X"] = attribution.specificity(cost_XX)
    return found


# --- results ---------------------------------------------------------------------------------------------------------


class Study(NamedTuple):
    """All that was measured."""

    found: dict[str, np.ndarray]  # `read_crosscoder`
    training: dict[str, np.ndarray]  # `along_training`
    baselines: dict[str, np.ndarray]  # `compare_baselines`
    attributed: dict[str, np.ndarray]  # `attribute_tasks`; empty without tasks
    tasks: list[Task]
    path: evolution.Trajectories
    paths: list[Turning]  # of every member
    life: evolution.Life
    share_H: np.ndarray  # total dimensionality of the latents that fire
    cosine_HH: np.ndarray  # mean cosine of their directions
    shift: evolution.Shift  # of directions between consecutive snapshots
    measures: evolution.Agreement
    complexity: evolution.Correlation | None
    controls: dict[str, dict[str, float]]  # crosscoders against that of arm 0


def emergence(life: evolution.Life, path: Turning, cfg: EvolutionConfig) -> np.ndarray:
    """The snapshot at which a latent appears, float `[F]`, NaN for none: first active by its rate; where all heads
    share one gate, and so one rate, by its norm."""
    H = len(path.norm_HF)
    if CROSSCODERS[cfg.loss].get("gate") != "per_head":
        return np.where(path.strength_HF.max(0) > 0, path.birth_F.astype(np.float64), np.nan)
    return np.where(life.first_active_F < H, life.first_active_F.astype(np.float64), np.nan)


def log_step(steps: Sequence[int], at: np.ndarray) -> np.ndarray:
    """log2(1 + step) of snapshots given as indices, NaN for none."""
    log_H = np.log2(1.0 + np.asarray(steps, np.float64))
    known = np.isfinite(at)
    return np.where(known, log_H[np.where(known, at, 0).astype(int)], np.nan)


def study(run: Run, cfg: EvolutionConfig, base: Base) -> Study:
    tasks = load_tasks(cfg, base, run.say)
    training = run.stage("along-training", partial(along_training, run, cfg, base))
    trained = train_crosscoders(run, cfg, base)
    found = run.stage("read", partial(read_crosscoder, run, cfg, base, trained))
    name = "baselines" if cfg.baselines else "baselines-linear"
    baselines = run.stage(name, partial(compare_baselines, cfg, base, trained))
    attributed = {}
    if tasks:
        attributed = run.stage(
            attribution_stage(cfg, tasks), partial(attribute_tasks, run, cfg, base, trained, tasks, found["rate_HF"])
        )
    fires_F = found["density_F"] > 0
    fires_GF = [fires_F, *baselines["fires"][1:]]
    paths = [path_of(member_of(trained.tree, g), base.steps, fires, cfg.seed) for g, fires in enumerate(fires_GF)]
    path = paths[0][0]
    boundary = cfg.boundary or round(base.steps[-1] ** 0.5)
    life = evolution.life_cycle(
        found["rate_HF"], path.cosine_FHH, path.norm_HF, base.steps,
        evolution.LifeCycle(boundary_step=boundary, baseline_step=max(1, round(base.steps[-1] ** 0.4))),
    )  # fmt: skip
    W_HFD = trained.tree["params"]["W_dec"][0]
    there_HF = (path.strength_HF > 0.1) & fires_F[None]
    share_H = np.asarray(evolution.dimensionality(jnp.asarray(W_HFD), jnp.asarray(there_HF)).share_H)
    scale_H = jnp.asarray(trained.tree["norm"]["scale"][0])
    cosine_HH = np.asarray(evolution.trajectories(jnp.asarray(W_HFD[:, fires_F]), scale_H).mean_cosine_HH)
    unit_HFD = np.asarray(dictionary.unit_decoder(jnp.asarray(W_HFD)))
    shift = evolution.distribution_shift(unit_HFD, ~path.dead_HF & fires_F[None], latents=1_024)
    measures = evolution.agreement({
        "norm": path.strength_HF[:, fires_F], "presence (error)": found["turned_nu_error_HF"][:, fires_F],
        "presence (activation)": found["turned_nu_activation_HF"][:, fires_F],
        "presence (reconstruction)": found["turned_nu_reconstruction_HF"][:, fires_F],
        "rate": found["rate_HF"][:, fires_F],
        "probe AUC": found["auc_HF"][:, fires_F],
    })  # fmt: skip
    born_F = log_step(base.steps, emergence(life, paths[0][1], cfg))
    complex_F = found["kind_complexity_F"]
    known_F = np.isfinite(born_F) & np.isfinite(complex_F)
    complexity = evolution.correlate(born_F, complex_F) if known_F.sum() >= 3 else None
    controls = {}
    for g in range(1, len(trained.members)):
        controls[trained.members[g][0]] = agreement_of(
            W_HFD,
            trained.tree["params"]["W_dec"][g],
            baselines["fires"][0],
            baselines["fires"][g],
            paths[0][1].birth_F,
            paths[g][1].birth_F,
            base.steps,
        )
    if trained.half is not None:
        half_W = trained.half[1]["params"]["W_dec"][0]
        half_steps = [base.steps[h] for h in trained.half_H]
        _, half_path = path_of(member_of(trained.half[1], 0), half_steps, baselines["half_fires"])
        # births on the coarse grid are compared with the fine ones seen through it
        seen_HF = paths[0][1].norm_HF[trained.half_H]
        fine_birth = np.argmax(seen_HF > 0.5 * seen_HF.max(0), axis=0)
        controls["every second snapshot"] = agreement_of(
            W_HFD[trained.half_H],
            half_W,
            baselines["fires"][0],
            baselines["half_fires"],
            fine_birth,
            half_path.birth_F,
            half_steps,
        )
    return Study(found, training, baselines, attributed, tasks, path, [p for _, p in paths], life, share_H,
                 cosine_HH, shift, measures, complexity, controls)  # fmt: skip


# --- claims: the rules, written before the runs in RESULTS.md --------------------------------------------------------


def turning_centre(path: Turning, steps: Sequence[int]) -> float:
    """When latents turn, in doublings of the step: the middle of every interval, weighted by its mean rotation."""
    log_H = np.log2(1.0 + np.asarray(steps, np.float64))
    weight_I = np.nan_to_num(path.turn.curve_I)
    return float(((log_H[1:] + log_H[:-1]) / 2 * weight_I).sum() / max(weight_I.sum(), 1e-12))


def bootstrap_share(true_F: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a share over resamples of the latents."""
    rng, n = np.random.default_rng(seed), len(true_F)
    share = rng.binomial(n, true_F.mean(), 4_000) / n
    return float(np.quantile(share, 0.025)), float(np.quantile(share, 0.975))


def judge(cfg: EvolutionConfig, base: Base, s: Study) -> list[Claim]:
    judged: list[Claim] = []
    H, S = len(base.steps), cfg.seeds if not cfg.snapshots_from else 1

    sound = H >= 5 and s.baselines["members"][0].mean() > 0.5

    def add(name: str, where: str, statement: str, expected, outcome) -> None:
        if not sound and name.split("-")[0] not in ("unigrams", "beyond", "complete"):
            outcome = claims.not_tested("needs five snapshots and a crosscoder that explains half of the variance")
        judged.append(
            Claim(name, where if where.startswith("ours") else f"arXiv {PAPER}, {where}", statement, expected, *outcome)
        )

    uni, bi = s.training["kl_unigram_model"][:S], s.training["kl_bigram_model"][:S]
    add("unigrams-first", "two phases", "the model is nearest to unigrams before it is nearest to bigrams (snapshots "
        "between the minima of KL(n-gram || model), a value a seed)", "> 0",
        claims.greater_than(bi.argmin(1) - uni.argmin(1), 0.0))  # fmt: skip
    away = s.training["kl_model_bigram"][:S, -1] - s.training["kl_model_bigram"][:S].min(1)
    add("beyond-bigrams", "two phases", "at the end the model is farther from bigrams than it was (KL(model || "
        "bigram), last minus least)", "> 0", claims.greater_than(away, 0.0))  # fmt: skip
    turn = s.paths[0].turn_log
    add("turning-point", "turning point", "latents turn most in one interval: rotation per doubling there over the "
        "median of the others", "> 2", claims.greater_than([turn.ratio], 2.0))  # fmt: skip
    add("turning-located", "ours", "the bootstrap over latents puts the turning point in one interval or its "
        "neighbours (width of the 95 % interval, intervals)", "<= 1", claims.less_than([turn.high - turn.low], 1.5)
        )  # fmt: skip
    lived_F = s.life.lifetime_F[~s.life.never_F]
    long_F = lived_F >= 0.6
    gated = CROSSCODERS[cfg.loss].get("gate") == "per_head"  # else all snapshots have one firing rate
    add("most-persist", "feature lifetimes", "most latents are active in 60 % of the snapshots or more (share of "
        "latents; bootstrap over latents)", "> 0.5",
        claims.greater_than([long_F.mean()], 0.5, bootstrap_share(long_F)) if long_F.size and gated
        else claims.not_tested("no latent fires" if gated else "one gate for all snapshots has no lifetimes")
        )  # fmt: skip
    c, born_F = s.complexity, emergence(s.life, s.paths[0], cfg)
    judged_F = np.isfinite(born_F) & np.isfinite(s.found["kind_complexity_F"])
    known, late = int(judged_F.sum()), int((born_F[judged_F] > 0).sum())
    add("complex-later", "emergence and complexity", f"later features are more complex: Spearman correlation of log "
        "emergence step and the share of activity no local context explains (bootstrap over latents; "
        f"{late} of {known} appear after the first snapshot)", 0.309,
        claims.greater_than([c.spearman], 0.0, (c.spearman_low, c.spearman_high)) if c is not None
        else claims.not_tested("fewer than three latents have both"))  # fmt: skip
    others = {
        "presence-error": "presence (error)",
        "presence-activation": "presence (activation)",
        "probe": "probe AUC",
    }
    for name, other in others.items():
        i, j, least = s.measures.names.index("norm"), s.measures.names.index(other), 0.5
        add(f"norm-tells-{name}", "norm and separability", f"along training a latent's norm moves with its "
            f"{other} (Spearman within latents, mean)", f"> {least}",
            claims.greater_than([s.measures.within_XX[i, j]], least))  # fmt: skip
    least = int(s.share_H.argmin())
    add("dimensions-grow", "total dimensionality", "the dimensions that features take shrink and then grow again: "
        "smaller of the falls from the first and the rise to the last snapshot", "> 0",
        claims.greater_than([min(s.share_H[0], s.share_H[-1]) - s.share_H[least]], 0.0))  # fmt: skip
    if "alone" in s.baselines:
        gain = s.baselines["members"][: cfg.crosscoder_seeds].mean(1) - s.baselines["alone"].mean()
        l0, alone_l0 = float(s.baselines["l0"][: cfg.crosscoder_seeds].mean()), float(s.baselines["alone_l0"].mean())
        alike = abs(l0 - alone_l0) <= 0.05 * max(l0, alone_l0)
        add("against-dictionaries", "comparison with dictionaries", "over all snapshots the crosscoder explains more "
            f"variance than dictionaries of one snapshot each, with {l0:.1f} and {alone_l0:.1f} active latents (a "
            "value a start)", "> 0", claims.greater_than(gain, 0.0) if alike
            else claims.not_tested("the numbers of active latents differ by more than 5 %"))  # fmt: skip
    if "held_out" in s.baselines:
        better = float((s.baselines["held_out"] - s.baselines["held_out_neighbours"]).mean())
        add("held-out-snapshots", "ours", "codes of a crosscoder that has not seen a snapshot predict it better than a "
            "linear map from the snapshots on both sides does (explained variance, mean over held-out snapshots)",
            "> 0", claims.greater_than([better], 0.0))  # fmt: skip
    if "every second snapshot" in s.controls:
        near = s.controls["every second snapshot"]["birth_near"]
        add("spacing", "ours", "with every second snapshot only, matched latents are born within one snapshot of where "
            "they were (share)", "> 0.8", claims.greater_than([near], 0.8))  # fmt: skip
    if "start 1" in s.controls:
        add("starts-agree", "ours", "another start of the crosscoder finds the same latents (share matched one to one "
            "with cosine 0.7)", "> 0.5", claims.greater_than([s.controls["start 1"]["matched"]], 0.5))  # fmt: skip
    warm = next((g for g, arm in enumerate(base.arms) if arm.name.startswith("warm-up")), None)
    if warm is not None:
        centres = [turning_centre(path, base.steps) for path in (s.paths[0], s.paths[cfg.crosscoder_seeds + warm - 1])]
        add("warm-up", "ours (asked by reviewers)", "when latents turn does not depend on the warm-up of the learning "
            "rate (rotation-weighted mean of log2 step, the longer warm-up's minus the shorter's, doublings)",
            "in [-0.5, 0.5]", claims.within([centres[1] - centres[0]], -0.5, 0.5))  # fmt: skip
    at = int(np.argmin(np.abs(np.array(cfg.top_k) - 10)))
    for task in s.tasks:
        get = {k.removeprefix(f"{task.name}_"): v for k, v in s.attributed.items() if k.startswith(f"{task.name}_")}
        clean, error = float(get["score_clean_H"][-1]), 1.96 * float(get["score_clean_se_H"][-1])
        saved = float(get["random_necessity_RHX"][:, -1, at].mean() - get["necessity_HX"][-1, at])
        half = 1.96 * float(get["necessity_se_HX"][-1, at])
        add(f"few-carry-{task.name}", "attribution", f"{task.name}: at the last snapshot the {cfg.top_k[at]} features "
            "with the largest attribution are needed more than random ones of like norm and rate (difference of the "
            f"share of the metric that is lost, mean of {cfg.draws} draws; normal interval over pairs)", "> 0",
            claims.greater_than([saved], 0.0, (saved - half, saved + half)) if clean - error > 0
            else claims.not_tested(f"the model does not do the task: logit difference {clean:.2f} +- {error:.2f}")
        )  # fmt: skip
        worst = float(np.max(np.abs(get["gap_H"]) / np.maximum(np.abs(get["clean_H"] - get["base_H"]), 1.0)))
        add(f"complete-{task.name}", "ours", f"{task.name}: attributions and error add up to the metric's change "
            "(largest mean gap of a snapshot, in units of the change, of 1 where that is smaller)", "< 1e-4",
            claims.less_than([worst], 1e-4))  # fmt: skip
    return judged


# --- tables, figures, views ------------------------------------------------------------------------------------------


CURVES = (
    "loss", "entropy", "kl_model_unigram", "kl_unigram_model", "kl_model_bigram", "kl_bigram_model", "tv_unigram",
    "tv_bigram", "apt",
)  # fmt: skip


def write_tables(run: Run, cfg: EvolutionConfig, base: Base, s: Study) -> None:
    H, F = len(base.steps), cfg.latents
    t, b = s.training, s.baselines
    rows = []
    for a, arm in enumerate(base.arms):
        for h, step in enumerate(base.steps):
            line = {"arm": arm.name, "step": step} | {name: float(t[name][a, h]) for name in CURVES}
            line["clustered"] = float(t["clustered"][a, h] / max(t["kept"][a, h], 1))
            rows.append(line | {"apt_ids_kept": int(t["kept"][a, h])})
    run.table("training", rows, "The model along training on held-out text, nats; entropies of the training text: "
              f"unigram {float(t['entropy_unigram']):.3f}, bigram {float(t['entropy_bigram']):.3f}; n-gram models on "
              f"the held-out text: {float(t['floor_unigram']):.3f}, {float(t['floor_bigram']):.3f}. apt: mean accuracy "
              "per token; clustered: share of the ids that pass the filter in a cluster of strong matches."
            )  # fmt: skip
    curves, rows, fires_F = s.life.curves, [], s.found["density_F"] > 0
    for h, step in enumerate(base.steps):
        line = {"step": step, "ev": float(s.found["ev_global_H"][h]), "l0": float(s.found["rate_HF"][h].sum()),
                "mean_norm": float(s.path.norm_HF[h, fires_F].mean()),
                "mean_raw_norm": float(s.path.raw_norm_HF[h, fires_F].mean()),
                "dimensions": float(s.share_H[h]), "new": int(curves.new_H[h]), "alive": int(curves.active_H[h]),
                "stabilising": int(curves.stabilising_H[h]), "drifting": int(curves.drifting_H[h]),
                "retired": int(curves.retired_H[h])}  # fmt: skip
        for name, values in (("rotation", s.paths[0].turn.curve_I), ("rotation_per_doubling",
                             s.paths[0].turn_log.curve_I * np.log(2)), ("sliced_wasserstein", s.shift.wasserstein_I),
                             ("mmd", s.shift.mmd_I)):  # fmt: skip
            line[f"{name}_to_next"] = float(values[h]) if h < H - 1 else None
        rows.append(line)
    run.table("snapshots", rows, "The crosscoder at every snapshot, on held-out text: explained variance, active "
              "latents of a token, decoder norms in normalised and raw units, share of the dimensions that features "
              "take, life cycle counts, and how far latents turn until the next snapshot (1 - cosine).")  # fmt: skip
    rows = []
    born_F = emergence(s.life, s.paths[0], cfg)
    kinds = np.array(features.KINDS)[s.found["kind_kind_F"]]
    for f in range(F):
        at = int(born_F[f]) if np.isfinite(born_F[f]) else None
        rows.append({
            "latent": f, "density": float(s.found["density_F"][f]),
            "norm_peak_step": base.steps[int(s.found["peak_F"][f])],
            "first_active_step": None if at is None else base.steps[at],
            "norm_above_half_from_step": base.steps[int(s.paths[0].birth_F[f])],
            "lifetime": float(s.life.lifetime_F[f]), "rate_class": evolution.CLASSES[int(s.life.class_F[f])],
            "stabilised_step": base.steps[int(s.life.stabilised_F[f])] if s.life.stabilised_F[f] < H else None,
            "drift": float(s.life.drift_F[f]) if np.isfinite(s.life.drift_F[f]) else None, "kind": str(kinds[f]),
            "grade": int(s.found["kind_grade_F"][f]),
            "complexity": float(c) if np.isfinite(c := s.found["kind_complexity_F"][f]) else None,
            "persistence": float(c) if np.isfinite(c := s.found["kind_persistence_F"][f]) else None,
            "first_cosine_last": float(s.path.cosine_FHH[f, 0, -1]),
        })  # fmt: skip
    run.table("latents", rows, "Every latent of the crosscoder: when it appears, peaks and settles, what kind it is, "
              "and its complexity (0: the token tells when it fires; 1: no local context does; noise too: persistence, "
              "the correlation with having fired earlier in the text, tells it from features of a text).")  # fmt: skip
    rows = []
    for kind in features.KINDS:
        use = kinds == kind
        steps = log_step(base.steps, born_F[use])
        steps = steps[np.isfinite(steps)]
        middle = round(float(np.exp2(np.quantile(steps, 0.5, method="lower")) - 1)) if steps.size else None
        rows.append({"kind": kind, "latents": int(use.sum()),
                     "median_first_active_step": middle,
                     "lifetime": float(s.life.lifetime_F[use].mean()) if use.any() else None})  # fmt: skip
    run.table("kinds", rows, "Kinds of latents (ours, see sae_jax.features), when their median appears and the share "
              "of snapshots in which they are active.")  # fmt: skip
    rows = []
    for h, step in enumerate(base.steps):
        line = {"step": step, "crosscoder": float(b["members"][0, h]), "crosscoder_l0": float(b["l0"][0, h])}
        if "alone" in b:
            line |= {"dictionary": float(b["alone"][h]), "dictionary_l0": float(b["alone_l0"][h])}
        line |= {"pca_joint": float(b["pca_joint"][h]), "pca_each": float(b["pca_each"][h]),
                 "linear_from_last": float(b["from_last"][h])}  # fmt: skip
        if "held_out" in b:
            at = np.flatnonzero(b["held_out_H"] == h)
            for name in ("held_out", "held_out_seen", "held_out_neighbours"):
                line[name] = float(b[name][at[0]]) if at.size else None
        rows.append(line)
    run.table("baselines", rows, f"Explained variance of every snapshot on held-out tokens. pca_*: {int(b['pca_k'])} "
              "components, of the snapshots side by side and of each alone; linear_from_last: a linear map of the last "
              "snapshot; held_out: a linear map of the codes of a crosscoder that has not seen this snapshot, "
              "held_out_seen: of one that has, held_out_neighbours: of the snapshots on both sides.")  # fmt: skip
    rows = [{"crosscoder": name} | found for name, found in s.controls.items()]
    if rows:
        run.table("controls", rows, "Other crosscoders against that of the study: share of their latents that match "
                  "one to one with a cosine of 0.7 (decoders of all snapshots laid end to end; other pre-trainings "
                  "of one seed start from the same weights), share of these born within one snapshot, median distance "
                  "of births in doublings of the step.")  # fmt: skip
    rows = []
    names = [f"start {g}" for g in range(cfg.crosscoder_seeds)] + [arm.name for arm in base.arms[1:]]
    for name, path in zip(names, s.paths, strict=True):
        for unit, turn in (("interval", path.turn), ("doubling", path.turn_log)):
            rows.append({"crosscoder": name, "rotation_per": unit, "from_step": base.steps[turn.at],
                         "to_step": base.steps[turn.at + 1], "low_from_step": base.steps[turn.low],
                         "high_from_step": base.steps[turn.high], "peak": float(turn.curve_I[turn.at]),
                         "over_median": float(turn.ratio), "cusum_step": base.steps[turn.cusum]})  # fmt: skip
    run.table("turning_points", rows, "Where latents turn most, with the 95 % bootstrap interval over latents.")
    m = s.measures
    rows = [
        {"measure": m.names[i], "other": m.names[j], "pooled": float(m.pooled_XX[i, j]),
         "within_latents": float(m.within_XX[i, j]), "latents": int(m.latents_XX[i, j])}
        for i, j in zip(*np.triu_indices(len(m.names), 1), strict=True)
    ]  # fmt: skip
    run.table("presence", rows, "Spearman correlation of measures of presence: over all latents and snapshots, and "
              "along training within latents (mean).")  # fmt: skip
    rows = []
    for task in s.tasks:
        for h, step in enumerate(base.steps):
            get = partial(_of_task, s, task)
            line = {"task": task.name, "step": step, "metric": float(get("score_clean_H")[h]),
                    "patched": float(get("score_base_H")[h]), "right": float(get("right_H")[h]),
                    "by_features": float(get("attribution_HF")[h].sum()), "by_error": float(get("error_H")[h]),
                    "gap": float(get("gap_H")[h]), "control_norm_gap": float(get("norm_gap_H")[h]),
                    "control_rate_gap": float(get("rate_gap_H")[h])}  # fmt: skip
            for x, k in enumerate(cfg.top_k):
                line |= {f"necessity_{k}": float(get("necessity_HX")[h, x]),
                         f"random_necessity_{k}": float(get("random_necessity_RHX")[:, h, x].mean()),
                         f"sufficiency_{k}": float(get("sufficiency_HX")[h, x]),
                         f"random_sufficiency_{k}": float(get("random_sufficiency_RHX")[:, h, x].mean())}  # fmt: skip
            rows.append(line)
    if rows:
        run.table("attribution", rows, "Tasks at every snapshot: logit difference of clean and patched pairs (half of "
                  "them; features are chosen on the other half, `right` and attributions are of that), attributions of "
                  "features and error node; share of the metric left without the k features of largest attribution "
                  "(necessity) and with them alone (sufficiency), beside random ones of like norm and rate; "
                  "control_*_gap: how far these are in log norm and log rate, mean."
                )  # fmt: skip
        rows = []
        for task in s.tasks:
            total_F, share_HF = np.abs(_of_task(s, task, "attribution_HF")[-1]), _of_task(s, task, "relative_HF")
            for f in np.argsort(-total_F)[:20]:
                rows.append({"task": task.name, "latent": int(f), "kind": str(kinds[f]),
                             "attribution_last": float(_of_task(s, task, "attribution_HF")[-1, f]),
                             "patching_last": float(_of_task(s, task, "patching_HF")[-1, f])}
                            | {f"relative_{n}": float(share_HF[h, f]) for h, n in enumerate(base.steps)})  # fmt: skip
        run.table("task_features", rows, "Features with the largest attribution at the last snapshot; relative_N: "
                  "share of a feature's attribution that falls on the snapshot of step N.")  # fmt: skip
    if "cost_XX" in s.attributed:
        names = [task.name for task in s.tasks]
        rows = [{"features_of": a} | {f"cost_{c}": float(s.attributed["cost_XX"][i, j]) for j, c in enumerate(names)}
                | {"specificity": float(s.attributed["specificity_X"][i]) if "specificity_X" in s.attributed else None}
                for i, a in enumerate(names)]  # fmt: skip
        run.table("specificity", rows, "Share of each task's metric that is lost without the "
                  f"{int(s.attributed['cost_k'])} features of a task, last snapshot; specificity 1: the task alone is "
                  "hit.")  # fmt: skip


def _of_task(s: Study, task: Task, name: str) -> np.ndarray:
    return s.attributed[f"{task.name}_{name}"]


@figures.style()
def draw(run: Run, cfg: EvolutionConfig, base: Base, s: Study) -> None:
    H, names = len(base.steps), step_names(base)
    x = np.arange(H)
    between = x[:-1] + 0.5

    def on_steps(ax, label: bool = True):
        every = -(-H // 12)
        ax.set_xticks(x[::every], names[::every], rotation=60)
        if label:
            ax.set_xlabel("snapshot at step")

    def below(fig, ax, ncols=3):
        fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=ncols)

    born_F = emergence(s.life, s.paths[0], cfg)
    lived = np.flatnonzero(np.isfinite(born_F))
    order = lived[np.lexsort((s.found["peak_F"][lived], born_F[lived]))] if lived.size else np.arange(cfg.latents)
    fig, axes = figures.new(1, 2, height=4.4)
    figures.heatmap(axes[0], s.path.strength_HF[:, order].T, label="norm / its maximum", vmin=0, vmax=1)
    axes[0].set(ylabel="latents, by first activity", title="Strength of latents")
    figures.heatmap(axes[1], s.cosine_HH, label="mean cosine", vmin=0, vmax=1)
    axes[1].set(title="Directions")
    axes[1].set_yticks(x[:: -(-H // 12)], names[:: -(-H // 12)])
    for ax in axes:
        on_steps(ax)
    run.figure("trajectories", fig, alt="Heat maps of decoder norms of all latents over snapshots, and of the cosine "
               "of decoders between snapshots", caption="Left: decoder norm of every latent that fires, over its "
               "maximum. Right: cosine of the same latent's decoders at two snapshots, mean weighted by norms."
             )  # fmt: skip

    t = s.training
    fig, axes = figures.new(2, 2, height=6.4)
    ax = axes[0, 0]
    for a, arm in enumerate(base.arms):
        figures.line(ax, x, t["loss"][a], label=arm.name)
    for name, style in (("unigram", ":"), ("bigram", "--")):
        ax.axhline(float(t[f"floor_{name}"]), color="#777777", linestyle=style, label=f"{name} model")
    ax.set(ylabel="nats a token", title="Loss on held-out text")
    ax.legend()
    ax = axes[0, 1]
    for name in ("model_unigram", "unigram_model", "model_bigram", "bigram_model"):
        label = f"KL({name.replace('_', ' || ')})"
        figures.line(ax, x, t[f"kl_{name}"][0], label=label)
    top = max(float(t[name][0].max()) for name in t if name.startswith("kl_"))
    ax.set(ylabel="nats", title="Distance from n-grams", ylim=(0, 1.45 * top))
    ax.legend(ncols=2, fontsize=7, loc="upper left")
    ax = axes[1, 0]
    curves = s.life.curves
    for values, label in ((curves.active_H, "alive"), (np.cumsum(curves.new_H), "appeared so far"),
                          (curves.retired_H, "retired")):  # fmt: skip
        figures.line(ax, x, values, label=label)
    ax.set(ylabel="latents", title="Features")
    ax.legend()
    ax = axes[1, 1]
    figures.line(ax, x, t["apt"][0], label="<APT>")
    figures.line(ax, x, t["clustered"][0] / np.maximum(t["kept"][0], 1), label="ids in clusters")
    figures.line(ax, x, s.share_H, label="dimensions taken")
    ax.set(ylabel="share", title="Accuracy per token, dimensions", ylim=(0, None))
    ax.legend()
    for ax in axes.flat:
        on_steps(ax, ax in axes[1])
    run.figure("phases", fig, alt="Loss, divergences from n-grams, counts of features and accuracy per token along "
               "training", caption="Two phases on one time axis: loss and distance from n-grams (top; of the first "
               "model), features that are alive, have appeared and have gone, accuracy per token and the dimensions "
               "they take (bottom).")  # fmt: skip

    fig, axes = figures.new(1, 2, height=3.8)
    labels = [f"start {g}" for g in range(cfg.crosscoder_seeds)] + [arm.name for arm in base.arms[1:]]
    for label, path in zip(labels, s.paths, strict=True):
        figures.line(axes[0], between, path.turn.curve_I, label=label)
        figures.line(axes[1], between, path.turn_log.curve_I * np.log(2), label=label)
    axes[0].set(ylabel="1 - cosine", title="Between snapshots")
    axes[1].set(ylabel="1 - cosine a doubling", title="A doubling of the step")
    for ax in axes:
        on_steps(ax)
    below(fig, axes[0])
    run.figure("turning", fig, alt="Mean rotation of decoders between consecutive snapshots",
               caption="How far latents turn, mean over those with a tenth of their largest norm at both ends, for "
               "other starts of the crosscoder and other pre-trainings.")  # fmt: skip

    fig, axes = figures.new(1, 2, height=3.8)
    complex_F = s.found["kind_complexity_F"]
    step_F = log_step(base.steps, born_F)
    known = np.isfinite(step_F) & np.isfinite(complex_F)
    jitter = np.random.default_rng(0).uniform(-0.25, 0.25, known.sum())
    axes[0].plot(born_F[known] + jitter, complex_F[known], "o", markersize=3, alpha=0.5)
    c = s.complexity
    title = (
        "Complexity"
        if c is None
        else f"Complexity: Spearman {c.spearman:.2f} [{c.spearman_low:.2f}, {c.spearman_high:.2f}]"
    )
    axes[0].set(ylabel="not explained by local context", title=title)
    on_steps(axes[0])
    axes[0].set_xlabel("first active at step")
    kinds = s.found["kind_kind_F"]
    bottom = np.zeros(H)
    shown = [k for k in range(len(features.KINDS)) if ((kinds == k) & np.isfinite(born_F)).any()]
    for k, colour in zip(shown, figures.PALETTE, strict=False):
        alive = (s.life.alive_HF & (kinds == k)[None]).sum(1)
        axes[1].bar(x, alive, bottom=bottom, color=colour, label=features.KINDS[k], width=0.8)
        bottom = bottom + alive
    axes[1].set(ylabel="alive latents", title="Kinds")
    on_steps(axes[1])
    below(fig, axes[1], 4)
    run.figure("complexity", fig, alt="Complexity of latents against the step they appear at, and kinds of alive "
               "latents along training", caption="Left: each latent's complexity (0: its token tells when it fires, 1: "
               "no local context does) against its first activity. Right: kinds of the latents that are alive."
             )  # fmt: skip

    b = s.baselines
    fig, axes = figures.new(1, 2, height=3.8)
    figures.line(axes[0], x, b["members"][0], label="crosscoder")
    if "alone" in b:
        figures.line(axes[0], x, b["alone"], label="a dictionary a snapshot")
    figures.line(axes[0], x, b["pca_joint"], label=f"PCA of all, {int(b['pca_k'])} components")
    figures.line(axes[0], x, b["pca_each"], label="PCA of each")
    figures.line(axes[0], x, b["from_last"], label="linear from the last")
    if "held_out" in b:
        axes[0].plot(b["held_out_H"], b["held_out"], "x", color="#000000", label="codes that never saw it")
    axes[0].set(
        ylabel="explained variance", title="Reconstruction, held-out text", ylim=(min(0.0, b["members"].min()), 1.02)
    )
    on_steps(axes[0])
    figures.heatmap(axes[1], s.measures.within_XX, rows=s.measures.names, cols=s.measures.names,
                    label="Spearman, within latents", vmin=-1, vmax=1)  # fmt: skip
    axes[1].set(title="Measures of presence")
    below(fig, axes[0], 3)
    run.figure("baselines", fig, alt="Explained variance of the crosscoder and its baselines at every snapshot, and "
               "correlations of measures of presence", caption="Left: explained variance; crosses: snapshots predicted "
               "linearly from the codes of a crosscoder that has not seen them. Right: do a latent's norm, its "
               "presence by latent scaling, its firing rate and its probe move together along training?")  # fmt: skip

    if s.tasks:
        fig, axes = figures.new(3, len(s.tasks), height=8.4, squeeze=False)
        for column, task in enumerate(s.tasks):
            get = partial(_of_task, s, task)
            ax = axes[0, column]
            figures.line(ax, x, get("score_clean_H"), label="clean")
            figures.line(ax, x, get("score_base_H"), label="patched")
            figures.line(ax, x, get("attribution_HF").sum(1), label="by features", linestyle="--")
            figures.line(ax, x, get("error_H"), label="by the error", linestyle=":")
            ax.set(ylabel="logit difference", title=figures.plain(task.name))
            on_steps(ax)
            total_F = np.abs(get("attribution_HF")).max(0)
            shown = np.argsort(-total_F)[:20]
            shown = shown[np.argsort(np.abs(get("attribution_HF")[:, shown]).argmax(0), kind="stable")]
            limit = float(total_F.max()) or 1.0
            figures.heatmap(axes[1, column], get("attribution_HF")[:, shown].T, rows=[str(f) for f in shown],
                            label="attribution", vmin=-limit, vmax=limit, cmap="RdBu")  # fmt: skip
            axes[1, column].tick_params(axis="y", labelsize=7)
            axes[1, column].set(ylabel="latent", title="Largest attributions")
            on_steps(axes[1, column])
            ax = axes[2, column]
            k_X = np.array(cfg.top_k)
            figures.line(ax, k_X, get("necessity_HX")[-1], label="without them")
            figures.line(ax, k_X, get("sufficiency_HX")[-1], label="with them alone")
            drawn = {"random_necessity_RHX": "without random ones", "random_sufficiency_RHX": "with random ones alone"}
            for (name, label), colour in zip(drawn.items(), figures.PALETTE, strict=False):
                figures.line(ax, k_X, get(name)[:, -1].mean(0), label=label, color=colour, linestyle=":")
            ax.set(xscale="log", xlabel="features", ylabel="share of the metric", title="Last snapshot")
        axes[0, 0].legend()
        axes[2, 0].legend()
        run.figure("attribution", fig, alt="Task metrics, attributions of features along training, necessity and "
                   "sufficiency of the largest", caption="Top: logit difference of each task and what integrated "
                   "gradients attribute to features and to the error node. Middle: the 20 latents of largest "
                   "attribution. Bottom: share of the metric that is left without, or with only, the features of "
                   "largest attribution (chosen on other pairs), and of random ones of like norm and rate."
                 )  # fmt: skip


def views(run: Run, cfg: EvolutionConfig, base: Base, s: Study) -> None:
    """Top contexts at the first, the turning and the last snapshot, in the feature browser."""
    H, tree = len(base.steps), member_of(finished_bank_of(run, cfg, base), 0)
    windows, rows, strings = base.corpus.held_out, s.found["rows"], base.corpus.tokenizer.tokens
    params_X = dictionaries.stack([base.trunk(params) for params in base.arms[0].params])
    dict_cfg = cfg.crosscoder(base.model.width, H)
    batch = windows.batch(rows)

    @jax.jit
    def codes(params_X, batch, h):
        x_RTHD = base.harvest(params_X, batch)
        R, T = batch["ids"].shape
        z_YF = dictionary.encode(tree, x_RTHD.reshape(R * T, H, -1), dict_cfg)
        f_RTF = dictionary.at_head(tree, z_YF, dict_cfg, h).reshape(R, T, -1)
        return jnp.where(activations.token_mask(batch, specials(base))[:, :, None], f_RTF, 0.0)

    density_F = s.found["density_F"]
    latents = np.sort(np.argsort(-density_F, kind="stable")[: cfg.browser_latents])
    latents = latents[density_F[latents] > 0]
    kinds = np.array(features.KINDS)[s.found["kind_kind_F"]]
    shown = sorted({0, min(s.paths[0].turn_log.at + 1, H - 1), H - 1})
    groups = []
    for h in shown:
        top = evaluate.TopContexts(*(s.found[f"top_{name}"][h] for name in ("value", "row", "position")))

        def codes_of(row_R, h=h):
            part = {name: batch[name][row_R] for name in ("ids", "segment")}
            return codes(params_X, part, jnp.int32(h))

        texts = evaluate.contexts(top, batch["ids"], batch["segment"], strings, 10, codes_of, latents.tolist(), ROWS)
        listed = []
        for f, places in zip(latents.tolist(), texts, strict=True):
            contexts = [Context(p["tokens"], p["values"]) for p in places]
            now, last = s.path.strength_HF[h, f], float(s.path.cosine_FHH[f, h, -1])
            listed.append(Feature(f, float(s.found["rate_HF"][h, f]), contexts, str(kinds[f]),
                                  status=f"strength {now:.0%}", matched=f, cosine=last))  # fmt: skip
        against = None if h == H - 1 else f"step {base.steps[-1]:,}"
        groups.append(Group(f"step {base.steps[h]:,}", listed, against))
    run.browser("latents", groups, "Latents of the crosscoder at the first snapshot, after the turning point and at "
                "the last one: where they fire most, their kind, their strength there, and the cosine of their "
                "direction with the last snapshot's.")  # fmt: skip


def finished_bank_of(run: Run, cfg: EvolutionConfig, base: Base) -> dictionary.Dictionary:
    members = cfg.crosscoder_seeds + len(base.arms) - 1
    return finished_bank(
        run.out / "checkpoints" / "crosscoder", cfg.crosscoder(base.model.width, len(base.steps)), members
    )


def run_evolution(run: Run, cfg: EvolutionConfig) -> None:
    check_settings(cfg)  # what cannot be is told before anything is trained
    base = load_base(run, cfg)
    run.say(base.name)
    s = study(run, cfg, base)
    run.write_claims(judge(cfg, base, s))
    write_tables(run, cfg, base, s)
    draw(run, cfg, base, s)
    views(run, cfg, base, s)
    turn, b = s.paths[0].turn_log, s.baselines
    summary = [
        f"{base.name}; crosscoder of {cfg.latents:,} latents at depth {base.depth}, loss {cfg.loss}.",
        f"Explained variance {b['members'][0].mean():.3f} (mean over snapshots) with {b['l0'][0].mean():.1f} active "
        f"latents a token; {float(s.found['dead']):.0%} of the latents are silent on the held-out text.",
        f"Latents turn most between steps {base.steps[turn.at]:,} and {base.steps[turn.at + 1]:,} (a doubling; 95 % "
        f"interval from {base.steps[turn.low]:,} to {base.steps[turn.high + 1]:,}).",
    ]
    for task in s.tasks:
        right = _of_task(s, task, "right_H")
        summary.append(f"{task.name}: right answer above the wrong one in {right[0]:.0%} of the pairs at the first and "
                       f"{right[-1]:.0%} at the last snapshot.")  # fmt: skip
    run.drop_stale()
    report.write(run, "How features are born, turn and die in pre-training", "Evolution of features", summary, PAPER)


if __name__ == "__main__":
    sys.exit(
        cli.main(
            "evolution",
            EvolutionConfig,
            PRESETS,
            run_evolution,
            "Crosscoders over the snapshots of a pre-training run: when features appear, turn and go, and which carry "
            "a task (arXiv 2509.17196).",
            [
                "python -m experiments.evolution",
                "python -m experiments.evolution --objective masked --out runs/evolution-bert",
                "python -m experiments.evolution --preset small --corpus wikipedia/ --task simple_test.jsonl",
                "python -m experiments.evolution --preset small --corpus wikipedia/ --snapshots-from RUN/snapshots",
            ],
        )
    )
