"""Fine-tuning along the blocks, and confidence against APT: the second half of arXiv 2509.03407.

Stages of `experiments.apt --task ...`, after its pre-training and evaluation. Each stage fine-tunes one bank, the
seeds side by side in one compiled step, and answers everything that is asked of it:

    pre-trained   the trunk of the largest W_S, fully fine-tuned; and the same with a frozen trunk and with LoRA
    none          the same network from its random start: what fine-tuning alone can do
    W_S, steps    trunks of smaller subsets and of snapshots: accuracy against the amount of pre-training

A fine-tuning seed draws the split, the head's start and the order of the rows; with several pre-training seeds each
has a trunk of its own. Letters beside those of `bert6_jax.classifier`: K shares of swapped tokens, A arms of the
replacement test.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax import checkpoint, classifier, lora, metrics, train
from bert6_jax.config import TransformerConfig
from bert6_jax.data.labelled import LabelledText, open_task, split_rows
from bert6_jax.data.tokenizer import Tokenizer
from bert6_jax.data.windows import rows_at, steps_per_epoch
from bert6_jax.errors import InputError
from experiments.harness import claims, figures
from experiments.harness.claims import Claim, interval, named, proportion
from experiments.harness.cli import option
from experiments.harness.run import Run
from synthetic import language

PAPER = "2509.03407"
SPLITS = ("text", "random")
ARMS = ("strong match", "random token")
# rows of each class for training and for the test (sheet, section 3); 0: all that the test leaves
RECIPES = {"fewrel": (630, 70), "dbpedia": (100, 100), "embedded-topic": (10, 50), "embedded-relation": (20, 30)}
later = partial(option, group="fine-tuning", may_change=True)


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of the fine-tuning stages. They may change in a run folder used again: stages carry their digest."""

    task: tuple[str, ...] = later(
        (), "`fewrel`, `dbpedia`, `embedded` (`embedded-topic`, `embedded-relation`), tfds:NAME or a .csv/.jsonl file; "
        "several with commas; empty: no fine-tuning",
    )  # fmt: skip
    task_data: Path | None = later(None, "raw folder of fewrel or dbpedia; needed until the set is prepared")
    text_column: str = later("text", "column of the text, of files and tfds: sets")
    label_column: str = later("label", "column of the class, of files and tfds: sets")
    train_per_class: int = later(
        0, "training rows of a class; 0: the task's own (fewrel 630, dbpedia 100), else all that are left", min=0
    )
    test_per_class: int = later(
        0, "test rows of a class; 0: the task's own (fewrel 70, dbpedia 100), else the official test part, else a "
        "tenth of the smallest class", min=0,
    )  # fmt: skip
    splits: tuple[str, ...] = later(
        ("text",), "`text`: no text on both sides (ours); `random`: by rows, as the recipe. The first gets the whole "
        "study, others pre-trained against not pre-trained", choices=SPLITS,
    )  # fmt: skip
    finetune_length: int = later(0, "positions of a row; 0: the longest text of the task, at most --length", min=0)
    methods: tuple[str, ...] = later(classifier.METHODS, "what is trained on the pre-trained trunk; `full` always is",
                                     choices=classifier.METHODS)  # fmt: skip
    pooling: str = later("cls", "what the classifier reads", choices=classifier.POOLINGS)
    finetune_seeds: int = later(
        3, "seeds of split, head and order; intervals are over them (ours). With several --seeds the same number", min=2
    )
    finetune_epochs: int = later(50, "passes over the training rows", min=1)
    finetune_batch: int = later(32, "rows of a batch", min=1)
    finetune_lr: float = later(5e-5, "AdamW learning rate", min=0.0)
    finetune_schedule: str = later("epoch_linear", "its schedule", choices=train.SCHEDULES)
    adapter_lr: float = later(1e-3, "AdamW learning rate of `frozen` and `lora` (ours)", min=0.0)
    lora_rank: int = later(8, "rank of the adapters (ours)", min=1)
    lora_targets: tuple[str, ...] = later(("attn/q", "attn/v"), "adapted matrices (ours)", choices=lora.TARGETS)
    probe_steps: int = later(2_000, "steps of the readouts of the blocks, all side by side (ours)", min=1)
    probe_lr: float = later(1e-2, "AdamW learning rate of these readouts (ours)", min=0.0)
    transfer_snapshots: int = later(3, "snapshots of pre-training that are fine-tuned too, a factor 4 apart", min=0)
    confidence_bins: int = later(8, "bins of equal count of mean input APT (ours)", min=2)
    confidence_min_count: int = later(
        10, "modified occurrences that an id needs for its APT to enter a text's mean (ours)", min=1
    )
    confidence_margin: float = later(
        0.05, "confidence is independent of APT if it changes by less from the 5th to the 95th percentile (ours)",
        min=1e-6, max=1.0,
    )  # fmt: skip
    replace_shares: tuple[float, ...] = later(
        (0.1, 0.2, 0.4), "shares of a text's tokens that are swapped (ours)", min=1e-6, max=1.0
    )

    @property
    def shares(self) -> list[float]:
        """Shares of swapped tokens, in order."""
        return sorted(set(self.replace_shares))

    def adapters(self) -> lora.LoraConfig:
        return lora.LoraConfig(self.lora_rank, self.lora_targets)


class Setting(NamedTuple):
    """What pre-training left for this half, prepared by `experiments.apt`."""

    model: TransformerConfig
    tokenizer: Tokenizer
    tokenizer_record: dict[str, Any]  # what checkpoints say of it
    mesh: Any
    seeds: int  # of pre-training
    sizes: dict[int, int]  # W_S -> steps of its pre-training
    trunk_at: Callable[[int, int, int], Any]  # (pre-training seed's number, W_S, step) -> parameters
    apt_SV: np.ndarray  # accuracy per token of the pre-trained model, by pre-training seed; NaN where undefined
    count_SV: np.ndarray  # modified occurrences behind it
    matches_S: list[metrics.Matches]  # its strong matches
    own_apt: dict[tuple[int, int], float]  # (W_S, step) -> <APT> of the model's own head, where it was measured
    frequency_V: np.ndarray
    special: tuple[int, ...]
    checkpoint_every: int


# --- tasks -----------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """A task and how many rows of each class it is trained and tested on (0: all that are there)."""

    task: LabelledText
    train_rows: int
    test_rows: int

    def split(self, by: str, seed: int):
        return split_rows(self.task, seed, self.train_rows, self.test_rows, by=by)


def task_specs(task: Sequence[str]) -> list[str]:
    """`--task` with `embedded` taken apart into its two tasks."""
    both = ("embedded-topic", "embedded-relation")
    return [s for spec in task for s in (both if spec == "embedded" else (spec,))]


def load_tasks(cfg: FinetuneConfig, lang: language.Language | None, seed: int, pretraining_seeds: int) -> list[Plan]:
    """The tasks of `--task`; everything that is wrong with them is told before anything is trained."""
    specs = task_specs(cfg.task)
    if not cfg.splits or not cfg.replace_shares:
        raise InputError("--splits and --replace-shares need at least one value each")
    if 0 < cfg.finetune_length < 3:
        raise InputError(f"--finetune-length {cfg.finetune_length} has no room for a token; give 3 or more, or 0")
    if specs and pretraining_seeds > 1 and pretraining_seeds != cfg.finetune_seeds:
        raise InputError(
            f"--seeds {pretraining_seeds} and --finetune-seeds {cfg.finetune_seeds}: give the same number, so that "
            "every fine-tuning has a pre-training of its own, or --seeds 1"
        )
    cfg.adapters()  # tells what is wrong with them
    plans: dict[str, Plan] = {}
    for spec in specs:
        train_rows, test_rows = RECIPES.get(spec, (0, 0))
        train_rows, test_rows = cfg.train_per_class or train_rows, cfg.test_per_class or test_rows
        if spec.startswith("embedded-"):
            if lang is None:
                raise InputError(f"--task {spec} is made of the embedded corpus; use it with --corpus embedded")
            made = language.make_task(lang, spec.removeprefix("embedded-"), 2 * (train_rows + test_rows), seed + 1)
            digest = hashlib.sha256("\n".join(made.texts).encode()).hexdigest()
            task = LabelledText(spec, digest, made.classes, made.texts, made.label_N, None)
        else:
            task = open_task(spec, cfg.task_data, text_column=cfg.text_column, label_column=cfg.label_column)
        if not test_rows and task.test_N is None:
            test_rows = max(1, int(np.bincount(task.label_N, minlength=len(task.classes)).min()) // 10)
        name = slug(task.name)
        if name in plans:
            raise InputError(f"--task names two tasks that are called {name}; rename a file, or run them one by one")
        plans[name] = Plan(task, train_rows, test_rows)
        for by in cfg.splits:
            for split_seed in range(cfg.finetune_seeds):
                plans[name].split(by, split_seed)
    return list(plans.values())


# --- one bank of fine-tunings ----------------------------------------------------------------------------------------


class Start(NamedTuple):
    """Where a bank begins, and how it is trained."""

    size: int
    step: int
    method: str

    @property
    def name(self) -> str:
        return f"ws{self.size}-step{self.step}-{self.method}"


@cache
def finetune_step(model: TransformerConfig, pooling: str, adapters, optimizer: train.OptimizerConfig, shared: bool):
    grad_fn = train.bank(classifier.grad_fn(model, pooling, adapters), None if shared else 0)
    return train.make_step(grad_fn, train.make_optimizer(optimizer, 1, 1))


@cache
def probe_step(optimizer: train.OptimizerConfig):
    return train.make_step(classifier.probe_grad_fn, train.make_optimizer(optimizer, 1, 1))


@cache
def predictor(model: TransformerConfig, pooling: str):
    return jax.jit(lambda params, batch: classifier.logits(params, batch, model, pooling))


def member(tree, g: int):
    return jax.tree.map(lambda x: x[g], tree)


class Bench(NamedTuple):
    """One task under one split: what every bank of it shares."""

    task: LabelledText
    by: str
    examples: classifier.Examples
    train_GN: list[np.ndarray]
    test_GN: list[np.ndarray]
    shared_texts: float  # test rows whose text is also in training, share

    @property
    def chance(self) -> float:
        """Accuracy of the most frequent class of the test rows, mean over seeds."""
        labels = [self.examples.label_N[rows] for rows in self.test_GN]
        return float(np.mean([np.bincount(label).max() / len(label) for label in labels]))


def make_bench(cfg: FinetuneConfig, setting: Setting, plan: Plan, by: str) -> Bench:
    task, splits = plan.task, [plan.split(by, seed) for seed in range(cfg.finetune_seeds)]
    # Members have the same number of rows: where all that is left is trained on, the split by text leaves a few more
    # or less.
    train_rows, test_rows = (min(len(getattr(s, side)) for s in splits) for side in ("train", "test"))
    length = min(cfg.finetune_length or setting.model.max_len, setting.model.max_len)
    examples = classifier.encode(setting.tokenizer, task.texts, task.label_N, len(task.classes), length)
    return Bench(
        task, by, examples, [s.train[:train_rows] for s in splits], [s.test[:test_rows] for s in splits],
        float(np.mean([s.shared_texts / len(s.test) for s in splits])),
    )  # fmt: skip


def stage_name(cfg: FinetuneConfig, bench: Bench, start: Start, details: bool) -> str:
    """A name with a digest of what the stage depends on: other settings are other stages."""
    names = ["pooling", "finetune_seeds", "finetune_epochs", "finetune_batch", "finetune_schedule", "finetune_length"]
    names += {"full": ["finetune_lr"], "frozen": ["adapter_lr"], "lora": ["adapter_lr", "lora_rank", "lora_targets"]}[
        start.method
    ]
    names += ["probe_steps", "probe_lr", "replace_shares"] if details else []
    rows = [len(bench.train_GN[0]), len(bench.test_GN[0])]
    settings = [bench.task.fingerprint, rows, {name: getattr(cfg, name) for name in names}]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:10]
    return f"finetune-{slug(bench.task.name)}-{bench.by}-{start.name}-{digest}"


def folder_of(run: Run, stage: str) -> Path:
    return run.out / "checkpoints" / "finetune" / stage.removeprefix("finetune-")


def run_bank(run: Run, cfg: FinetuneConfig, setting: Setting, bench: Bench, start: Start, details: bool) -> dict:
    """Fine-tune every seed from `start`, answer the test rows; with `details` the probes and, for the last trunk, the
    replacement test too. Returns the arrays of a stage."""
    model, adapters, G, C = setting.model, cfg.adapters(), cfg.finetune_seeds, len(bench.task.classes)
    stage = stage_name(cfg, bench, start, details)
    folder = folder_of(run, stage)
    trunks = [setting.trunk_at(s, start.size, start.step) for s in range(setting.seeds)]
    parts = []
    for g in range(G):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(g), 20_011), 2)
        head = classifier.init_head(keys[0], model, C, cfg.pooling)
        parts.append(classifier.split(keys[1], trunks[g % len(trunks)], head, start.method, adapters))
    stack = partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
    trained_G0, shared = stack(*[trained for trained, _ in parts]), len(trunks) == 1
    frozen = parts[0][1] if shared else stack(*[frozen for _, frozen in parts])
    del parts

    per_epoch = steps_per_epoch(len(bench.train_GN[0]), cfg.finetune_batch)
    steps = cfg.finetune_epochs * per_epoch
    lr = cfg.finetune_lr if start.method == "full" else cfg.adapter_lr
    optimizer = train.OptimizerConfig(lr, schedule=cfg.finetune_schedule)
    state = train.fit(
        finetune_step(model, cfg.pooling, adapters, optimizer, shared),
        train.init_state(trained_G0, train.make_optimizer(optimizer, steps, per_epoch), jax.random.key(20_021)),
        classifier.bank_batches(bench.examples, bench.train_GN, range(G), cfg.finetune_batch),
        train.FitConfig(steps, min(16, steps), setting.checkpoint_every),
        frozen=frozen,
        mesh=setting.mesh,
        folder=folder / "state" if steps > setting.checkpoint_every else None,  # a short bank starts over
        description={"stage": stage, "model": dataclasses.asdict(model)},
        on_metrics=lambda number, values: run.log(stage, number, **values),
        on_start=lambda number: run.rewind(stage, number),
        label=f"{bench.task.name} {start.method} W_S {start.size} step {start.step}",
        tokens_per_step=G * cfg.finetune_batch * bench.examples.ids_NT.shape[1],
        quiet=run.quiet,
    )
    trained_G = jax.device_get(state.params)
    del state, trained_G0  # the optimiser's moments and the start are not needed any more
    found: dict[str, Any] = {}
    params_G = []
    for g in range(G):
        trunk = frozen if shared else member(frozen, g)
        params_G.append(jax.device_put(classifier.assemble(member(trained_G, g), trunk, adapters)))
        if details or start.method != "full":
            keep(setting, cfg, bench, start, folder / f"seed{g}", params_G[g], member(trained_G, g), trunk, steps)
    predict = predictor(model, cfg.pooling)

    def answers(params, examples, rows):
        return classifier.in_batches(examples, rows, 64, lambda batch: predict(params, batch))

    logits_GNC = np.stack([answers(p, bench.examples, rows) for p, rows in zip(params_G, bench.test_GN, strict=True)])
    found["probability"], found["prediction"] = confident(logits_GNC)
    found["label"] = np.stack([bench.examples.label_N[rows] for rows in bench.test_GN])
    found["loss"] = cross_entropy(logits_GNC, found["label"])
    found["steps"] = np.int64(steps)
    if details:
        found |= read_blocks(run, cfg, setting, bench, params_G, start, "probe")
    if details and start.step:
        found |= read_blocks(run, cfg, setting, bench, [trunks[g % len(trunks)] for g in range(G)], start, "before")
        found |= swap(cfg, setting, bench, params_G, logits_GNC, answers)
    return found


def keep(setting, cfg, bench, start: Start, path: Path, params, trained, trunk, steps) -> None:
    """The fine-tuned model of one seed: kind `transformer`, or `adapter` where the trunk stays."""
    if path.exists():
        return
    extra = {"task": bench.task.name, "split": bench.by, "classes": list(bench.task.classes), "pooling": cfg.pooling}
    if start.method == "full":
        checkpoint.save(path, params, kind="transformer", config=dataclasses.asdict(setting.model) | {"head": "none"},
                        step=steps, tokenizer=setting.tokenizer_record, extra=extra)  # fmt: skip
    else:
        extra |= {"base": f"checkpoints/seed*/ws{start.size}/snapshots/step_{start.step:08d}"}
        classifier.save_adapter(path, trained, trunk, setting.model, cfg.adapters(), cfg.pooling, step=steps,
                                tokenizer=setting.tokenizer_record, extra=extra)  # fmt: skip


def slug(name: str) -> str:
    """A task's name as part of a file name."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in Path(name).name if c.isascii())[:60] or "task"


def softmax(logits_XC: np.ndarray) -> np.ndarray:
    e = np.exp(logits_XC - logits_XC.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def confident(logits_XC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest probability and whose it is."""
    return softmax(logits_XC).max(-1).astype(np.float32), logits_XC.argmax(-1).astype(np.int32)


def cross_entropy(logits_XNC: np.ndarray, label_XN: np.ndarray) -> np.ndarray:
    """Mean over N in nats."""
    log_p = np.log(np.maximum(softmax(logits_XNC.astype(np.float64)), 1e-300))
    return -np.take_along_axis(log_p, label_XN[..., None], -1)[..., 0].mean(-1)


def read_blocks(run: Run, cfg, setting: Setting, bench: Bench, params_G, start: Start, name: str) -> dict:
    """A new linear layer on every depth of each frozen network, both poolings: `NAME_probability` and
    `NAME_prediction` [G, P, M, N] on the test rows."""
    model, C = setting.model, len(bench.task.classes)
    P, M = len(classifier.POOLINGS), model.depths
    kept = []
    for g, params in enumerate(params_G):

        def harvest(rows, params=params):
            def get(batch):
                return classifier.features(params, batch, model).reshape(64, P * M, model.width)

            return classifier.in_batches(bench.examples, rows, 64, get)

        x_NXD, label_N = harvest(bench.train_GN[g]), bench.examples.label_N[bench.train_GN[g]]
        X, size = P * M, 4 * cfg.finetune_batch
        steps, per_epoch = cfg.probe_steps, steps_per_epoch(len(label_N), size)
        optimizer = train.OptimizerConfig(cfg.probe_lr, weight_decay=0.0, schedule="warmup_linear")

        def batch_at(step, g=g, x_NXD=x_NXD, label_N=label_N, size=size, X=X):
            row_B, valid_B = rows_at(g + 7_000_003, step, len(label_N), size)
            both = [np.broadcast_to(v[:, None], (size, X)) for v in (label_N[row_B], valid_B)]
            return {"x": x_NXD[row_B], "label": both[0], "valid": both[1]}

        probes = train.fit(
            probe_step(optimizer),
            train.init_state(classifier.init_probes(X, model.width, C),
                             train.make_optimizer(optimizer, steps, per_epoch), jax.random.key(0)),
            batch_at, train.FitConfig(steps, min(20, steps)), mesh=setting.mesh, quiet=run.quiet,
            label=f"{bench.task.name} readout of every block, seed {g}",
        ).params  # fmt: skip
        del x_NXD, batch_at
        probes = jax.device_get(probes)
        logits_NXC = np.concatenate(
            [np.asarray(classifier.probe_logits(probes, part)) for part in np.array_split(harvest(bench.test_GN[g]), 8)]
        )
        kept.append(confident(np.moveaxis(logits_NXC, 0, 1).reshape(P, M, -1, C)))
    probability, prediction = (np.stack(part) for part in zip(*kept, strict=True))
    return {f"{name}_probability": probability, f"{name}_prediction": prediction}


# --- the replacement test --------------------------------------------------------------------------------------------


def partners(setting: Setting, s: int, neighbours: int = 10) -> tuple[np.ndarray, list[np.ndarray]]:
    """For every id its strongest match (-1: it has none), and what it is compared with: tokens of nearly the frequency
    of that match that are neither of the two nor a strong match of the id in either direction."""
    matches, V = setting.matches_S[s], setting.frequency_V.size
    row, col, ratio = (np.asarray(x) for x in (matches.row_E, matches.col_E, matches.ratio_E))
    real = ratio > 0
    row, col, ratio = row[real], col[real], ratio[real]
    best_V = np.full(V, -1)
    order = np.lexsort((-col, ratio))  # the last assignment wins: the highest ratio, then the lowest id
    best_V[row[order]] = col[order]
    candidates = np.flatnonzero((setting.frequency_V > 0) & ~np.isin(np.arange(V), setting.special))
    candidates = candidates[np.argsort(setting.frequency_V[candidates], kind="stable")]
    place_V = np.full(V, -1)
    place_V[candidates] = np.arange(len(candidates))
    matched: dict[int, set[int]] = {}
    for i, j in zip(row.tolist(), col.tolist(), strict=True):
        matched.setdefault(i, set()).add(j)
        matched.setdefault(j, set()).add(i)
    near = [np.zeros(0, np.int64)] * V
    for i in np.flatnonzero(best_V >= 0).tolist():
        place = place_V[best_V[i]]
        if place >= 0:
            around = candidates[max(place - neighbours, 0) : place + neighbours + 1]
            near[i] = np.array([j for j in around.tolist() if j != i and j not in matched[i]], np.int64)
    return best_V, near


def swap(cfg, setting: Setting, bench: Bench, params_G, logits_GNC, answers) -> dict[str, np.ndarray]:
    """Swap a share of each test text's tokens for a strong match, or the same positions for a token of like frequency.

    `swap_p` [G, K, A, N]: probability of the label predicted before; `swap_hit`: still right; `swap_same`: still the
    same answer; `swap_count` [G, K, N]: tokens swapped (0: the text has none with a strong match and is left out);
    `swap_types` [G]: different tokens of the test texts that can be swapped; `swap_frequency` [G, K, A]: mean log10
    frequency of what was put in.
    """
    G, K, N = len(params_G), len(cfg.shares), len(bench.test_GN[0])
    found = {
        "swap_p": np.zeros((G, K, len(ARMS), N), np.float32), "swap_hit": np.zeros((G, K, len(ARMS), N), bool),
        "swap_same": np.zeros((G, K, len(ARMS), N), bool), "swap_count": np.zeros((G, K, N), np.int32),
        "swap_types": np.zeros(G, np.int32), "swap_frequency": np.full((G, K, len(ARMS)), np.nan),
        "swap_tokens": np.zeros((G, N), np.int32), "swap_p_before": np.zeros((G, N), np.float32),
    }  # fmt: skip
    for g, params in enumerate(params_G):
        best_V, near = partners(setting, g % setting.seeds)
        usable_V = (best_V >= 0) & np.array([len(x) > 0 for x in near])
        rows = bench.test_GN[g]
        ids_NT, segment_NT, label_N, cut_N = (x[rows] for x in bench.examples)
        found["swap_types"][g] = np.unique(ids_NT[usable_V[ids_NT] & (segment_NT > 0)]).size
        before_NC = softmax(logits_GNC[g])
        said_N = before_NC.argmax(-1)
        found["swap_p_before"][g] = before_NC.max(-1)
        found["swap_tokens"][g] = tokens_N = np.maximum((segment_NT > 0).sum(1) - 2, 1)
        rng = np.random.Generator(np.random.Philox(key=np.array([g, 30_011], np.uint64)))
        order_NT = np.where(usable_V[ids_NT] & (segment_NT > 0), rng.random(ids_NT.shape), 2.0)
        rank_NT = order_NT.argsort(1).argsort(1)
        pick_NT = rng.random(ids_NT.shape)
        for k, share in enumerate(cfg.shares):
            wanted_N = np.maximum(1, np.round(share * tokens_N)).astype(int)
            chosen_NT = (order_NT < 2.0) & (rank_NT < wanted_N[:, None])
            found["swap_count"][g, k] = chosen_NT.sum(1)
            strong_NT, random_NT = ids_NT.copy(), ids_NT.copy()
            strong_NT[chosen_NT] = best_V[ids_NT[chosen_NT]]
            random_NT[chosen_NT] = [
                near[i][int(u * len(near[i]))]
                for i, u in zip(ids_NT[chosen_NT].tolist(), pick_NT[chosen_NT].tolist(), strict=True)
            ]
            for a, swapped_NT in enumerate((strong_NT, random_NT)):
                if chosen_NT.any():
                    put_in = setting.frequency_V[swapped_NT[chosen_NT]]
                    found["swap_frequency"][g, k, a] = np.log10(np.maximum(put_in, 1)).mean()
                examples = classifier.Examples(swapped_NT, segment_NT, label_N, cut_N)
                after_NC = softmax(answers(params, examples, np.arange(N)))
                found["swap_p"][g, k, a] = after_NC[np.arange(N), said_N]
                found["swap_hit"][g, k, a] = after_NC.argmax(-1) == label_N
                found["swap_same"][g, k, a] = after_NC.argmax(-1) == said_N
    return found


# --- the study -------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """All that was measured of one task under one split."""

    bench: Bench
    main: dict  # the pre-trained trunk, fully fine-tuned
    scratch: dict  # no pre-training
    others: dict[Start, dict]
    apt_GN: np.ndarray  # mean APT of the test rows' tokens, NaN where no token has one


def starts(cfg: FinetuneConfig, setting: Setting) -> list[Start]:
    """Every bank beside the pre-trained and the untrained one."""
    largest = max(setting.sizes)
    steps = setting.sizes[largest]
    snapshots = [2**i for i in range(steps.bit_length()) if 2**i <= steps // 2][::-2][: cfg.transfer_snapshots]
    found = [Start(largest, step, "full") for step in sorted(snapshots)]
    found += [Start(size, setting.sizes[size], "full") for size in sorted(setting.sizes) if size != largest]
    return found + [Start(largest, steps, method) for method in classifier.METHODS[1:] if method in cfg.methods]


def input_apt(setting: Setting, bench: Bench, least: int) -> np.ndarray:
    """Mean APT of every test row's tokens [G, N]; specials and tokens with under `least` modified occurrences, whose
    APT is mostly noise, are passed over."""
    means = []
    for g, rows in enumerate(bench.test_GN):
        s = g % setting.seeds
        apt_V = np.where(setting.count_SV[s] >= least, setting.apt_SV[s], np.nan)
        apt_V[list(setting.special)] = np.nan
        value_NT = np.where(bench.examples.segment_NT[rows] > 0, apt_V[bench.examples.ids_NT[rows]], np.nan)
        known_NT = np.isfinite(value_NT)
        total = np.where(known_NT, value_NT, 0.0).sum(1)
        means.append(np.where(known_NT.any(1), total / np.maximum(known_NT.sum(1), 1), np.nan))
    return np.stack(means).astype(np.float32)


def study(run: Run, cfg: FinetuneConfig, setting: Setting, plans: Sequence[Plan]) -> list[Found]:
    """Every bank of every task and split."""
    results = []
    largest = max(setting.sizes)
    for plan in plans:
        for by in cfg.splits:
            bench = make_bench(cfg, setting, plan, by)

            def bank(start: Start, details: bool = False, bench=bench) -> dict:
                name = stage_name(cfg, bench, start, details)
                found = run.stage(name, partial(run_bank, run, cfg, setting, bench, start, details))
                if run.primary:  # its results are kept, and the models that matter
                    shutil.rmtree(folder_of(run, name) / "state", ignore_errors=True)
                return found

            main = bank(Start(largest, setting.sizes[largest], "full"), details=True)
            scratch = bank(Start(largest, 0, "full"), details=True)
            others = {start: bank(start) for start in starts(cfg, setting)} if by == cfg.splits[0] else {}
            results.append(Found(bench, main, scratch, others, input_apt(setting, bench, cfg.confidence_min_count)))
    return results


def accuracy(found: dict, prefix: str = "") -> np.ndarray:
    """Share of right answers by seed and whatever stands between seeds and rows: [G, ...]."""
    label = found["label"].reshape(found["label"].shape[0], *(1,) * (found[f"{prefix}prediction"].ndim - 2), -1)
    return (found[f"{prefix}prediction"] == label).mean(-1)


def groups(found: dict) -> dict[str, np.ndarray]:
    """Which test rows [G, N] each curve of confidence against APT is over."""
    right = found["prediction"] == found["label"]
    return {"all": np.ones_like(right), "right": right, "wrong": ~right}


MIN_ROWS = 20  # of a seed, for a correlation
MIN_TYPES = 20  # different tokens that can be swapped, for the replacement test
CEILING = 0.99  # accuracy from which nothing can be said about a rise


def associations(found: Found) -> dict[str, list[metrics.Association]]:
    """Confidence against mean input APT, by group and seed; seeds with fewer than 20 rows of a group are left out."""
    result = {}
    for name, use_GN in groups(found.main).items():
        members = [
            jax.tree.map(float, jax.device_get(metrics.association(x_N, y_N, use_N)))
            for x_N, y_N, use_N in zip(found.apt_GN, found.main["probability"], use_GN, strict=True)
        ]
        result[name] = [a for a in members if a.count >= MIN_ROWS]
    return result


def swap_effect(found: dict) -> dict[str, np.ndarray]:
    """By seed, share and arm [G, K, A] over the texts with a swapped token: `drop` of the probability of the answer
    given before, `accuracy`, `same` answers; and `share` of tokens swapped, `texts` used, both [G, K]."""
    used = found["swap_count"] > 0
    weight = used[:, :, None] / np.maximum(used.sum(-1), 1)[:, :, None, None]
    nothing = ~used.any(-1)[:, :, None]

    def mean(values):
        return np.where(nothing, np.nan, (values * weight).sum(-1))

    share = found["swap_count"] / found["swap_tokens"][:, None]
    return {
        "drop": mean(found["swap_p_before"][:, None, None] - found["swap_p"]),
        "accuracy": mean(found["swap_hit"]),
        "same": mean(found["swap_same"]),
        "share": np.where(nothing[..., 0], np.nan, (share * used).sum(-1) / np.maximum(used.sum(-1), 1)),
        "texts": used.sum(-1),
    }


# --- claims: rules written before the runs of RESULTS.md -------------------------------------------------------------


def judge(cfg: FinetuneConfig, setting: Setting, results: Sequence[Found]) -> list[Claim]:
    judged = []
    for found in results:
        task, by = found.bench.task.name, found.bench.by
        prefix = slug(task) + ("" if by == "text" else f"-{by}-split")
        where = f"{task}, split by {by}"

        def rising(values_GX):
            if min(values_GX[:, 0].mean(), values_GX[:, -1].mean()) >= CEILING:
                return claims.not_tested(
                    f"accuracy is at least {CEILING:g} from the first to the last: no room to rise"
                )
            return claims.increasing(values_GX)

        def add(name, place, statement, expected, outcome, prefix=prefix, where=where):
            judged.append(
                Claim(f"{prefix}-{name}", f"arXiv {PAPER}, {place}", f"{where}: {statement}", expected, *outcome)
            )

        probes_GPM = accuracy(found.main, "probe_")
        cls, mean = (probes_GPM[:, classifier.POOLINGS.index(pooling)] for pooling in ("cls", "mean"))
        add("blocks-cls", "claim 5", "fine-tuned accuracy rises along blocks 1 to the last (linear readout of [CLS]; "
            "at block 0 it is constant)", "rises", rising(cls[:, 1:]))  # fmt: skip
        add("blocks-mean", "claim 5", "fine-tuned accuracy rises along the blocks (linear readout of the mean)",
            "rises", rising(mean))  # fmt: skip
        confidence = found.main["probe_probability"].mean(-1)[:, classifier.POOLINGS.index("cls")]
        add("confidence-blocks", "(ours)", "the readouts' mean confidence rises along blocks 1 to the last ([CLS])",
            "rises", claims.increasing(confidence[:, 1:]))  # fmt: skip
        gain = accuracy(found.main) - accuracy(found.scratch)
        add("pretraining", "control (ours)", "pre-trained minus not pre-trained, accuracy after the same fine-tuning",
            "positive", claims.greater_than(gain, 0.0))  # fmt: skip
        steps = sorted((start.step, start) for start in found.others if start.method == "full")
        by_steps = [start for _, start in steps if start.size == max(setting.sizes)]
        if by_steps:
            curve = [found.scratch, *(found.others[start] for start in by_steps), found.main]
            outcome = rising(np.stack([accuracy(f) for f in curve], 1))
        else:
            outcome = claims.not_tested("needs --transfer-snapshots, and the first of the --splits")
        add("transfer", "(ours)", "fine-tuned accuracy rises with the steps of pre-training", "rises", outcome)
        change, margin = associations(found), cfg.confidence_margin
        for group, statement in (("all", "all predictions"), ("right", "right ones"), ("wrong", "wrong ones")):
            values = [a.change for a in change[group]]
            if len(values) < 2:
                outcome = claims.not_tested(f"needs {MIN_ROWS} such test rows in two seeds")
            elif group == "right" and groups(found.main)["right"].all():
                outcome = claims.not_tested("no prediction is wrong: these are all predictions")
            elif np.mean([a.most for a in change[group]]) <= margin:
                outcome = claims.not_tested(
                    f"confidence varies so little that even a perfect correlation would stay within {margin:g}"
                )
            else:
                outcome = claims.within(values, -margin, margin)
            add(f"confidence-apt-{group}", "claim 5",
                f"label confidence does not depend on the input's mean APT ({statement}): its change from the 5th to "
                "the 95th percentile", f"within {margin:g} (ours)", outcome)  # fmt: skip
        effect = swap_effect(found.main)
        swapped = effect["share"][:, -1]
        swapped, asked = (
            float(swapped[np.isfinite(swapped)].mean()) if np.isfinite(swapped).any() else 0.0,
            cfg.shares[-1],
        )
        types = int(found.main["swap_types"].min())
        enough = effect["texts"][:, -1].min() >= MIN_ROWS and types >= MIN_TYPES and swapped >= asked / 2
        differ = effect["drop"][:, -1, 1] - effect["drop"][:, -1, 0]
        needs = (
            f"needs {MIN_TYPES} different tokens with a strong match ({types}), half of the asked share ({swapped:.0%})"
        )
        add("replacement", "claim 5 (ours)",
            f"swapping {swapped:.0%} of the tokens for strong matches costs less confidence than for random tokens of "
            "the matches' frequency", "positive",
            claims.greater_than(differ, 0.0) if enough else claims.not_tested(f"{needs} and {MIN_ROWS} texts"),
            )  # fmt: skip
    return judged


# --- tables and figures ----------------------------------------------------------------------------------------------


NETWORKS = ("fine-tuned", "fine-tuned without pre-training", "pre-trained, not fine-tuned")


def by_network(found: Found) -> list[tuple[str, dict, str]]:
    return list(zip(NETWORKS, (found.main, found.scratch, found.main), ("probe_", "probe_", "before_"), strict=True))


def write_tables(run: Run, cfg: FinetuneConfig, setting: Setting, results: Sequence[Found]) -> None:
    G, M = cfg.finetune_seeds, setting.model.depths
    trunks = "one pre-training" if setting.seeds == 1 else "as many pre-trainings"
    over = f"mean and 95 % t interval over {G} fine-tuning seeds of {trunks} (they share the pool of test texts)"
    rows = []
    for found in results:
        head = {"task": found.bench.task.name, "split": found.bench.by}
        for network, source, prefix in by_network(found):
            hits_GPM, confidence_GPM = accuracy(source, prefix), source[f"{prefix}probability"].mean(-1)
            for p, pooling in enumerate(classifier.POOLINGS):
                for m in range(M):
                    rows.append(
                        head
                        | {"network": network, "block": m, "readout": f"linear, {pooling}"}
                        | proportion("accuracy", hits_GPM[:, p, m])
                        | proportion("confidence", confidence_GPM[:, p, m])
                    )
            if prefix == "probe_":
                rows.append(head | {"network": network, "block": M - 1, "readout": f"own head, {cfg.pooling}"}
                            | proportion("accuracy", accuracy(source))
                            | proportion("confidence", source["probability"].mean(-1)))  # fmt: skip
    run.table("finetune_by_block", rows, f"Accuracy and mean confidence (largest probability) by block; {over}. A "
              "linear layer is trained on the frozen network at every depth; at block 0 [CLS] is constant.",
              )  # fmt: skip

    rows, stats = [], []
    for found in results:
        head = {"task": found.bench.task.name, "split": found.bench.by}
        for group, use_GN in groups(found.main).items():
            bins_GN = [np.asarray(metrics.equal_count_bins(x, use, cfg.confidence_bins))
                       for x, use in zip(found.apt_GN, use_GN, strict=True)]  # fmt: skip
            for q in range(cfg.confidence_bins):
                here = [b == q for b in bins_GN]
                if not all(h.any() for h in here):
                    continue
                x, y = ([float(v[h].mean()) for v, h in zip(values, here, strict=True)]
                        for values in (found.apt_GN, found.main["probability"]))  # fmt: skip
                rows.append(head | {"predictions": group, "bin": q, "rows": int(sum(h.sum() for h in here)),
                                    "input_apt": float(np.mean(x))} | proportion("confidence", y))  # fmt: skip
        for group, members in associations(found).items():
            line = head | {"predictions": group, "seeds": len(members),
                           "rows": int(sum(use.sum() for use in groups(found.main)[group]))}  # fmt: skip
            for name in ("pearson", "spearman", "slope", "change", "most"):
                line |= named(name, [getattr(a, name) for a in members])
            stats.append(line)
    run.table("confidence_vs_apt", rows, "Confidence of the fine-tuned model against the mean APT (of the pre-trained "
              f"model) of the test text's tokens, bins of equal count; {over}.")  # fmt: skip
    run.table("confidence_stats", stats, "The same as numbers: correlations, slope, and `change`, the slope times the "
              "distance of the 5th and 95th percentile of input APT, and `most`, what it would be at a correlation of "
              f"1. Margin of independence, stated in advance: {cfg.confidence_margin:g}.")  # fmt: skip

    rows = []
    for found in results:
        effect = swap_effect(found.main)
        for k, share in enumerate(cfg.shares):
            for a, arm in enumerate(ARMS):
                rows.append({"task": found.bench.task.name, "split": found.bench.by, "asked_share": share,
                             "swapped_share": interval(effect["share"][:, k])["mean"],
                             "texts": int(effect["texts"][:, k].sum()), "types": int(found.main["swap_types"].mean()),
                             "swapped_for": arm,
                             "log10_frequency": interval(found.main["swap_frequency"][:, k, a])["mean"]}
                            | named("confidence_drop", effect["drop"][:, k, a])
                            | proportion("accuracy", effect["accuracy"][:, k, a])
                            | proportion("same_answer", effect["same"][:, k, a]))  # fmt: skip
    run.table("replacement", rows, "Swapping tokens of the test texts for their strongest match, or the same positions "
              "for tokens of that match's frequency that are no match: fall of the probability of the answer given "
              f"before, accuracy after, share of unchanged answers; {over}. Only tokens that have a strong match are "
              "swapped, so fewer than asked for may be.")  # fmt: skip

    rows = []
    for found in results:
        largest = max(setting.sizes)
        banks = [(Start(largest, 0, "full"), found.scratch), *found.others.items(),
                 (Start(largest, setting.sizes[largest], "full"), found.main)]  # fmt: skip
        for start, source in sorted(banks, key=lambda pair: (pair[0].method != "full", pair[0].step > 0, pair[0])):
            apt = setting.own_apt.get((start.size, start.step))
            lr = cfg.finetune_lr if start.method == "full" else cfg.adapter_lr
            rows.append({"task": found.bench.task.name, "split": found.bench.by, "method": start.method,
                         "subset": start.size if start.step else 0, "pretraining_steps": start.step, "apt_mean": apt}
                        | proportion("accuracy", accuracy(source)) | named("loss", source["loss"])
                        | {"chance": found.bench.chance, "train_rows": len(found.bench.train_GN[0]),
                           "test_rows": len(found.bench.test_GN[0]), "shared_texts": found.bench.shared_texts,
                           "cut_texts": float(found.bench.examples.cut_N.mean()),
                           "finetuning_steps": int(source["steps"]), "lr": lr})  # fmt: skip
    run.table("transfer", rows, "Test accuracy and loss (nats) after fine-tuning, by the pre-training before it "
              "(subset 0: none) and by what is trained. chance: the most frequent class. cut_texts: "
              "share of texts longer than a row. shared_texts: share of the test rows whose text is also in "
              f"training; {over}.")  # fmt: skip


@figures.style()
def draw(run: Run, cfg: FinetuneConfig, setting: Setting, results: Sequence[Found]) -> None:
    M, over = setting.model.depths, f"95 % interval over {cfg.finetune_seeds} fine-tuning seeds"

    def panels(rows: int, height: float):
        fig, axes = figures.new(rows, len(results), height=height, squeeze=False)
        return fig, axes

    def below(fig, axes):
        """One legend for all panels, under them."""
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

    def title(found: Found) -> str:
        return figures.plain(found.bench.task.name) + ("" if found.bench.by == "text" else f" ({found.bench.by} split)")

    fig, axes = panels(2, 6.2)
    for column, found in enumerate(results):
        for row, pooling in enumerate(("cls", "mean")):
            ax, p = axes[row, column], classifier.POOLINGS.index(pooling)
            for network, source, prefix in by_network(found):
                figures.seed_band(ax, np.arange(M), accuracy(source, prefix)[:, p], label=network)
            ax.axhline(found.bench.chance, color="#777777", linestyle=":", label="chance")
            ax.set(xlabel="block (0: embedding)", ylabel="test accuracy", ylim=(0, 1.02),
                   title=f"{title(found)}, {'[CLS]' if pooling == 'cls' else 'mean'}")  # fmt: skip
    below(fig, axes)
    run.figure("finetune_by_block", fig, alt="Test accuracy of linear readouts against block, by network and pooling",
               caption=f"Accuracy of a linear layer on the frozen network, block by block: on [CLS] (top; constant at "
               f"block 0) and on the mean over positions (bottom). Bands: {over}.")  # fmt: skip

    fig, axes = panels(1, 3.6)
    for ax, found in zip(axes[0], results, strict=True):
        confidence_GPM = found.main["probe_probability"].mean(-1)
        for p, pooling in enumerate(classifier.POOLINGS):
            name = "[CLS]" if pooling == "cls" else "mean"
            figures.seed_band(ax, np.arange(M), confidence_GPM[:, p], label=f"confidence, {name}")
            figures.seed_band(
                ax, np.arange(M), accuracy(found.main, "probe_")[:, p], label=f"accuracy, {name}", linestyle="--"
            )
        ax.set(xlabel="block (0: embedding)", ylabel="mean over test rows", ylim=(0, 1.02), title=title(found))
    below(fig, axes)
    run.figure(
        "confidence_by_block",
        fig,
        alt="Mean confidence and accuracy of linear readouts against block",
        caption=f"Mean confidence of the readouts of the fine-tuned network beside their accuracy. Bands: {over}.",
    )

    fig, axes = panels(1, 3.6)
    for ax, found in zip(axes[0], results, strict=True):
        for group, use_GN in groups(found.main).items():
            bins_GN = [np.asarray(metrics.equal_count_bins(x, use, cfg.confidence_bins))
                       for x, use in zip(found.apt_GN, use_GN, strict=True)]  # fmt: skip
            at = [q for q in range(cfg.confidence_bins) if all((b == q).any() for b in bins_GN)]
            if not at or use_GN.sum(1).min() < MIN_ROWS or (group == "right" and use_GN.all()):
                continue
            x, y = (np.array([[v[b == q].mean() for q in at] for v, b in zip(values, bins_GN, strict=True)])
                    for values in (found.apt_GN, found.main["probability"]))  # fmt: skip
            figures.seed_band(ax, x.mean(0), y, label=f"{group} predictions")
        ax.set(xlabel="mean APT of the text's tokens", ylabel="confidence", ylim=(0, 1.02), title=title(found))
    axes[0, 0].legend()
    run.figure("confidence_vs_apt", fig, alt="Confidence against mean input APT in bins of equal count",
               caption="Confidence of the fine-tuned model against the mean APT of its input, in bins of equal count, "
               f"and apart for right and wrong predictions (groups of {MIN_ROWS} rows or more). Bands: {over}.",
               )  # fmt: skip

    fig, axes = panels(1, 3.6)
    for ax, found in zip(axes[0], results, strict=True):
        effect = swap_effect(found.main)
        for a, arm in enumerate(ARMS):
            figures.seed_band(ax, np.array(cfg.shares) * 100, effect["drop"][:, :, a], label=f"for a {arm}")
        ax.axhline(0, color="#777777", linewidth=0.8)
        ax.set(xlabel="tokens to swap, % of the text", ylabel="fall of the answer's probability", title=title(found))
    axes[0, 0].legend()
    run.figure("replacement", fig, alt="Fall of confidence against the share of swapped tokens, strong match or random",
               caption="What swapping tokens costs the answer: for strong matches, and at the same positions for "
               f"tokens of like frequency. Bands: {over}.")  # fmt: skip

    fig, axes = panels(1, 3.6)
    largest = max(setting.sizes)
    for ax, found in zip(axes[0], results, strict=True):
        curve = [(0, found.scratch)]
        curve += sorted((s.step, f) for s, f in found.others.items() if s.method == "full" and s.size == largest)
        curve.append((setting.sizes[largest], found.main))
        steps = [step for step, _ in curve]
        figures.seed_band(
            ax, np.arange(len(curve)), np.stack([accuracy(f) for _, f in curve], 1), label=f"W_S {largest:,}, by step"
        )
        for start, source in found.others.items():
            place = len(curve) - 1
            if start.method != "full":
                label, marker = {"frozen": "frozen trunk", "lora": "LoRA"}[start.method], {"frozen": "s", "lora": "D"}
                ax.plot([place], [accuracy(source).mean()], marker[start.method], label=label)
            elif start.size != largest:
                ax.plot([place], [accuracy(source).mean()], "_", markersize=14, label=f"W_S {start.size:,}, last step")
        ax.axhline(found.bench.chance, color="#777777", linestyle=":", label="chance")
        ax.set_xticks(np.arange(len(curve)), ["none"] + [f"{step:,}" for step in steps[1:]])
        ax.set(xlabel="steps of pre-training", ylabel="test accuracy", ylim=(0, 1.02), title=title(found))
    below(fig, axes)
    run.figure("transfer", fig, alt="Test accuracy after fine-tuning against the steps of pre-training",
               caption="Accuracy after the same fine-tuning, against the pre-training before it; at the right also "
               f"smaller subsets, a frozen trunk and LoRA. Band: {over}.")  # fmt: skip


def summary(results: Sequence[Found]) -> list[str]:
    lines = []
    for found in results:
        probes = accuracy(found.main, "probe_").mean(0)[classifier.POOLINGS.index("cls")]
        lines.append(
            f"{found.bench.task.name} ({len(found.bench.task.classes)} classes, split by {found.bench.by}, "
            f"{found.bench.shared_texts:.1%} of the test texts also in training): accuracy "
            f"{accuracy(found.main).mean():.3f} after pre-training, {accuracy(found.scratch).mean():.3f} without; a "
            f"linear readout of [CLS] goes from {probes[1]:.3f} at block 1 to {probes[-1]:.3f} at the last."
        )
    return lines
