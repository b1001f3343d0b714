"""Training sparse dictionaries: ours against sae_lens and dictionary_learning, side by side in one run.

    python -m benchmarks.dictionaries step       one TopK step (d 768, 8,192 latents, k 32, batch 2,048, float32)
    python -m benchmarks.dictionaries bank       the 18 dictionaries of arXiv 2502.16722 at once, against 18 trainings
    python -m benchmarks.dictionaries selection  ways to choose the k largest and to multiply with sparse codes
    python -m benchmarks.dictionaries recovery   planted dictionaries found again: TopK, BatchTopK, JumpReLU

The peers come with `pip install -e ".[bench]"`; without them their lines are left out. Every peer starts from our
weights and reads our batches, and the losses after the last step are printed beside each other. Rounds of ours and
theirs alternate; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import bert6_jax.train
from benchmarks.side_by_side import alternate, device, torch_threads
from sae_jax import activations, dictionary, evaluate, sparse, train
from sae_jax.config import DictionaryConfig, TrainConfig
from sae_jax.losses import Hyper
from synthetic import planted

LR = 3e-4


def race(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, their calls taking turns; one call of each goes before, unmeasured."""
    calls = {name: lambda call=call: jax.block_until_ready(call()) for name, call in contestants.items()}
    return {name: statistics.median(times) for name, times in alternate(calls, rounds).items()}


def report(seconds: dict[str, float], losses: dict[str, float], steps: int = 1) -> None:
    ours = next(iter(seconds.values()))
    for name, value in seconds.items():
        loss = f"  loss after the last step {losses[name]:.6g}" if name in losses else ""
        print(f"  {name:38s} {value / steps * 1e3:9.1f} ms   {value / ours:6.2f} x ours{loss}", flush=True)


class Ours:
    """A bank of ours that takes its turns in a race: all of its batches in one dispatch, as `fit` sends them."""

    def __init__(self, cfg: DictionaryConfig, train_cfg: TrainConfig, hyper, params_G, x_NBSD, sites):
        norm = {"mean": jnp.zeros((cfg.heads, cfg.width)), "scale": jnp.ones(cfg.heads)}
        state = train.init_state(jax.random.key(0), cfg, train_cfg, hyper, norm, params=params_G, sites=sites)
        self.state = jax.tree.map(jnp.array, state)  # the step donates it
        steps = bert6_jax.train.many_steps(train.make_step(cfg, train_cfg, activations.given))
        self.steps, self.x_NBSD, self.metrics = jax.jit(steps, donate_argnums=0), jnp.asarray(x_NBSD), {}

    def __call__(self):
        self.state, self.metrics = self.steps(self.state, {"x": self.x_NBSD}, len(self.x_NBSD), None)
        return self.metrics["loss"]

    def loss(self) -> float:
        return float(self.metrics["loss"][-1])


class Theirs:
    """Trainers of a peer, one after the other, each through all of the batches; `step(x)` gives the loss."""

    def __init__(self, steps: Sequence[Callable], x: Sequence[Sequence[np.ndarray]]):
        torch = torch_threads()
        self.steps, self.x = steps, [[torch.tensor(member) for member in batch] for batch in x]
        self.losses = []

    def __call__(self):
        self.losses = [[step(batch[g]) for batch in self.x][-1] for g, step in enumerate(self.steps)]

    def loss(self) -> float:
        return float(np.mean(self.losses))


def sae_lens_step(cfg: DictionaryConfig, params, batch: int, sparsity: float) -> Callable:
    """The step of SAELens' own trainer of the same dictionary, from the same weights."""
    torch = torch_threads()
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    common = dict(d_in=cfg.width, d_sae=cfg.latents, apply_b_dec_to_input=cfg.subtract_bias, decoder_init_norm=None)
    if cfg.activation == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(k=cfg.k, rescale_acts_by_decoder_norm=False, **common))
    else:
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=sparsity, **common))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor(np.asarray(params["W_enc"][0]).T))
        sae.W_dec.copy_(torch.tensor(np.asarray(params["W_dec"][0])))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    config = SAETrainerConfig(10**9, batch, lr=LR, lr_end=LR, logger=LoggingConfig(log_to_wandb=False))
    trainer = SAETrainer(config, sae, iter(()))
    return lambda x: float(trainer.step(x).loss)


def dictionary_learning_step(cfg: DictionaryConfig, params, batch: int, sparsity: float) -> Callable:
    """The step of dictionary_learning's own trainer of the same dictionary, from the same weights."""
    torch = torch_threads()
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10**6, activation_dim=cfg.width, dict_size=cfg.latents, k=cfg.k, layer=0, lm_name="-", lr=LR,
        warmup_steps=0, device="cpu", seed=0,
    )  # fmt: skip
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(torch.tensor(np.asarray(params["W_enc"][0])))
        trainer.ae.decoder.weight.copy_(torch.tensor(np.asarray(params["W_dec"][0]).T))
    return lambda x: trainer.update(1, x)  # not 0: there it would set b_dec to the data's median


def planted_rows(width: int, rows: int, batches: int, sites: int = 1) -> np.ndarray:
    """Rows with sparse structure, `[batches, rows, sites, D]`: what dictionaries are made for, and no special case."""
    generator = np.random.Generator(np.random.Philox(key=3))
    truth_XD = generator.standard_normal((4 * width, width)).astype(np.float32) / np.sqrt(width, dtype=np.float32)
    on = generator.random((batches * rows * sites, 4 * width), np.float32) < 20 / (4 * width)
    x = (on * generator.random(on.shape, np.float32)) @ truth_XD
    return x.reshape(batches, rows, sites, width)


def step(rounds: int, steps: int) -> None:
    """One TopK step of a large dictionary."""
    cfg = DictionaryConfig(768, 8192, activation="topk", k=32, decoder="unit", centre=False, scale="none")
    batch = 2048
    print(f"TopK step: d 768, 8,192 latents, k 32, batch {batch:,}, float32, {device()}")
    x_NBSD = planted_rows(cfg.width, batch, 2)
    params = dictionary.init(jax.random.key(1), cfg)
    params_G = jax.tree.map(lambda leaf: leaf[None], params)
    for peer in ("sae_lens", "dictionary_learning"):
        # SAELens leaves the decoder's norms free; dictionary_learning keeps them at 1
        kind = dataclasses.replace(cfg, decoder="free" if peer == "sae_lens" else "unit")
        train_cfg = TrainConfig(steps=10**6, batch=batch, lr_warmup=0.0, lr_decay=0.0, clip=1.0)
        ours = Ours(kind, train_cfg, [Hyper(lr=LR, k=32)], params_G, x_NBSD, None)
        name = f"bert6-jax ({kind.decoder} decoder)"
        contestants: dict[str, Callable] = {name: ours}
        try:
            make = sae_lens_step if peer == "sae_lens" else dictionary_learning_step
            theirs = make(kind, params, batch, 0.0)
            contestants[peer] = Theirs([theirs], [[x[:, 0]] for x in x_NBSD])
        except ImportError as error:
            print(f"  {peer} is not installed ({error})")
        seconds = race(contestants, rounds)
        report(seconds, {name: call.loss() for name, call in contestants.items()}, len(x_NBSD))


def bank(rounds: int, steps: int) -> None:
    """The 18 dictionaries of arXiv 2502.16722 (3 layers x 3 sets x {pre-trained, fine-tuned}) in shape and batch;
    start, rate and penalty are such that SAELens' trainer can have the same."""
    G, batch, sparsity = 18, 16, 7.5e-4
    cfg = DictionaryConfig(
        768, 1024, activation="relu", subtract_bias=False, decoder="free", code_norm="l2", centre=False, scale="none"
    )
    print(f"bank of {G} dictionaries: d 768, 1,024 latents, ReLU + L1, batch {batch}, float32, {device()}")
    x_NBSD = planted_rows(cfg.width, batch, 20, G)
    params_G = jax.vmap(lambda g: dictionary.init(jax.random.fold_in(jax.random.key(1), g), cfg))(jnp.arange(G))
    train_cfg = TrainConfig(steps=10**6, batch=batch, lr_warmup=0.0, lr_decay=0.0, sparsity_warmup=0.0, clip=1.0)
    hyper = [Hyper(lr=LR, sparsity=sparsity)] * G
    ours = Ours(cfg, train_cfg, hyper, params_G, x_NBSD, np.arange(G)[:, None])
    contestants: dict[str, Callable] = {"bert6-jax, one bank": ours}
    try:
        members = [jax.tree.map(lambda leaf, g=g: leaf[g], params_G) for g in range(G)]
        theirs = [sae_lens_step(cfg, params, batch, sparsity) for params in members]
        contestants["sae_lens, 18 trainings"] = Theirs(theirs, [[x[:, g] for g in range(G)] for x in x_NBSD])
    except ImportError as error:
        print(f"  sae_lens is not installed ({error})")
    seconds = race(contestants, rounds)
    report(seconds, {name: call.loss() for name, call in contestants.items()}, len(x_NBSD))


def selection(rounds: int, steps: int) -> None:
    """The parts of a TopK step, and what they could be instead."""
    B, D, F, K = 2048, 768, 8192, 32
    print(f"parts of a TopK step: batch {B:,}, d {D}, {F:,} latents, k {K}, float32, {device()}")
    keys = jax.random.split(jax.random.key(0), 3)
    pre_BF, g_BD = jax.random.normal(keys[0], (B, F)), jax.random.normal(keys[1], (B, D))
    W_FD = jax.random.normal(keys[2], (F, D))
    value_BK, index_BK = jax.jit(sparse.top_latents, static_argnums=1)(pre_BF, K)
    z_BF = sparse.scatter_codes(value_BK, index_BK, F)

    def bisect(pre_BF):
        def halve(_, bounds):
            low_B, high_B = bounds
            middle_B = (low_B + high_B) / 2
            many_B = (pre_BF > middle_B[:, None]).sum(-1) > K
            return jnp.where(many_B, middle_B, low_B), jnp.where(many_B, high_B, middle_B)

        return jax.lax.fori_loop(0, 24, halve, (pre_BF.min(-1), pre_BF.max(-1)))[1]

    for title, calls in {
        "the k largest of a row": {
            "two short sorts over groups (ours)": (partial(sparse.top_latents, K=K), pre_BF),
            "jax.lax.top_k": (partial(jax.lax.top_k, k=K), pre_BF),
            "threshold by bisection, 24 counts": (bisect, pre_BF),
        },
        "the k B largest of the batch": {
            "bisection of the bits, 31 counts (ours)": (partial(sparse.batch_largest, k=K), pre_BF)
        },
        "decode": {
            "by rows (ours on CPU)": (sparse._gathered, value_BK, index_BK, W_FD),
            "gather, einsum": (lambda z, i, W: jnp.einsum("bk,bkd->bd", z, W[i]), value_BK, index_BK, W_FD),
            "dense product": (jnp.matmul, z_BF, W_FD),
        },
        "gradient of the codes": {
            "by rows (ours on CPU)": (sparse._dots, g_BD, index_BK, W_FD),
            "gather, einsum": (lambda g, i, W: jnp.einsum("bd,bkd->bk", g, W[i]), g_BD, index_BK, W_FD),
            "dense product": (lambda g, W: g @ W.T, g_BD, W_FD),
        },
        "gradient of the decoder": {
            "by rows (ours on CPU)": (partial(sparse._scattered, F=F), value_BK, index_BK, g_BD),
            "scatter-add of [B K, D]": (
                lambda z, i, g: jnp.zeros((F, D)).at[i.reshape(-1)].add((z[:, :, None] * g[:, None]).reshape(-1, D)),
                value_BK, index_BK, g_BD,
            ),
            "dense product": (lambda z, g: z.T @ g, z_BF, g_BD),
        },
    }.items():  # fmt: skip
        print(f" {title}")
        report(race({name: partial(jax.jit(f), *args) for name, (f, *args) in calls.items()}, rounds), {})


def recovery(rounds: int, steps: int) -> None:
    """Planted dictionaries: 256 directions in 64 dimensions, 3 of them in a row; 3 seeds a bank, 256 latents."""
    world_cfg = planted.PlantedConfig(latents=256, width=64, active=3.0, probabilities="uniform", noise=0.01)
    world = planted.make(jax.random.key(7), world_cfg)
    truth_XD = np.asarray(world.directions)
    print(f"recovery: {world_cfg}, {steps:,} steps of 512 rows, three seeds; {device()}")
    variants = {
        "topk": (dict(activation="topk", k=3), Hyper(lr=5e-3, k=3)),
        "batch_topk": (dict(activation="batch_topk", k=3), Hyper(lr=5e-3, k=3)),
        "jumprelu": (
            dict(activation="jumprelu", penalty="l0", decoder="unit", bandwidth=0.3, threshold_init=0.5),
            Hyper(lr=2e-3, sparsity=1.0),
        ),
    }

    def rows(source, batch, frozen):
        x_BD, _ = planted.sample(jax.random.fold_in(jax.random.key(8), batch["step"][0]), world, world_cfg, 512)
        return source, x_BD[:, None]

    for name, (kind, hyper) in variants.items():
        cfg = DictionaryConfig(64, 256, **kind)
        train_cfg = TrainConfig(steps=steps, batch=512, dead_after=50_000)
        norm = dictionary.fit_norm(rows(None, activations.no_batch(2**30), None)[1], cfg)
        state = bert6_jax.train.fit(
            train.make_step(cfg, train_cfg, rows),
            train.init_state(jax.random.key(9), cfg, train_cfg, [hyper] * 3, norm),
            activations.no_batch, bert6_jax.train.FitConfig(steps, dispatch=50), label=name, quiet=True,
        )  # fmt: skip
        x_NHD = rows(None, activations.no_batch(2**30 + 1), None)[1]
        for seed in range(3):
            found = train.member(state, seed)
            xhat_NHD, z_NF = dictionary.reconstruct(found, x_NHD, cfg)
            stats = evaluate.summary(evaluate.stats_of(x_NHD, xhat_NHD, z_NF, jnp.ones(len(x_NHD), bool)))
            score = evaluate.recovery(np.asarray(found["params"]["W_dec"][0]), truth_XD)
            print(
                f"  {name:11s} seed {seed}: mean matched cosine {score['matched_cosine']:.3f}, above 0.9: "
                f"{score['share_above']:.0%}, explained variance {stats['ev_global']:.3f}, L0 {stats['l0']:.2f}",
                flush=True,
            )


def main() -> None:
    benchmarks = {"step": step, "bank": bank, "selection": selection, "recovery": recovery}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", nargs="*", choices=[[], *benchmarks], help="which; default all")
    parser.add_argument("--rounds", type=int, default=10, help="measured turns of each contestant")
    parser.add_argument("--steps", type=int, default=3_000, help="training steps of `recovery`")
    args = parser.parse_args()
    for name in args.benchmark or benchmarks:
        benchmarks[name](args.rounds, args.steps)


if __name__ == "__main__":
    main()
