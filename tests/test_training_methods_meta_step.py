"""Meta-training steps in float64: against the literal transcription, finite differences, and reproducibility."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import torch
from small_model import B, M, batch, model, settings
from torch import Tensor

import metagmvae.training.device.precision
import metagmvae.training.methods.meta_step
from metagmvae.pipelines.records import SetBatch
from metagmvae.training.device.seeding import keyed_generator
from metagmvae.training.methods.meta_gmvae import MetaGMVAE
from metagmvae.training.methods.meta_step import MetaStep
from metagmvae.training.objectives.distinct_points import MixtureError, init_indices
from metagmvae.training.objectives.mixture import fit_mixture


def gradients(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("decoded", [1, 4])
def test_loss_of_a_step_equals_the_transcription(scale: str, decoded: int) -> None:
    """From pixels to Eq. 9: the networks are those under test; densities, EM and sums are plain loops. (The noise is
    float32.)"""
    net, sets = model(), batch()
    options = settings(objective_scale=scale, decode_samples=decoded, seed=5)
    loss, terms = MetaStep(net, options).eval()(sets)
    elbos = []
    for b, episode in enumerate(sets.episodes):
        generator = keyed_generator(torch.device("cpu"), 5, "meta", int(episode))
        noise = torch.randn(M, 4, 2, generator=generator)
        x = torch.tensor(sets.images[b]).double() / 255
        with torch.no_grad():
            mean, log_variance = (part[0] for part in net.posterior(net.encode_images(x)[None]))
            z = mean[:, None] + (0.5 * log_variance).exp()[:, None] * noise
            p = torch.sigmoid(net.decode(z[:, :decoded].flatten(0, 1))).unflatten(0, (M, decoded))
        rows = init_indices(z.flatten(0, 1)[None], 3, [generator])[0]
        weights, means = reference.em(z.flatten(0, 1).numpy(), rows.tolist(), 3)
        args = (x.numpy(), p.numpy(), z.numpy(), mean.numpy(), log_variance.exp().numpy(), weights, means)
        elbos.append(reference.elbo(*args, scale=scale))
    assert float(loss.detach()) == pytest.approx(-reference.batch_objective(elbos), rel=1e-8)
    per_point = np.mean(elbos) / (M if scale == "sum" else 1)
    assert float(terms["elbo"]) == pytest.approx(per_point, rel=1e-8)
    parts = terms["reconstruction"] + terms["prior"] + terms["entropy"]
    assert float(parts) == pytest.approx(per_point, rel=1e-8)
    assert not any(value.requires_grad for value in terms.values())


@pytest.mark.parametrize("train", [False, True])
def test_gradient_of_a_step_equals_finite_differences_with_psi_fixed(
    train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along random directions in all parameters, with batch normalisation in either mode."""
    net, sets = model(), batch()
    step = MetaStep(net, settings(decode_samples=2)).train(train)
    fitted = {}

    def fit_once(z: Tensor, rows: Tensor, iterations: int) -> Any:
        return fitted.setdefault("psi", fit_mixture(z, rows, iterations))

    monkeypatch.setattr(metagmvae.training.methods.meta_step, "fit_mixture", fit_once)
    step(sets)[0].backward()
    gradient = gradients(net)
    assert set(gradient) == {name for name, _ in net.named_parameters()}
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in start.items()}

        def value(h: float, direction: dict[str, Tensor] = direction) -> float:
            with torch.no_grad():
                for name, p in net.named_parameters():
                    p.copy_(start[name] + h * direction[name])
                return float(step(sets)[0])

        h = 1e-6
        numeric = (value(h) - value(-h)) / (2 * h)
        analytic = sum(float((gradient[name] * direction[name]).sum()) for name in start)
        assert analytic == pytest.approx(numeric, rel=2e-5)


def test_episodes_of_a_step_are_independent() -> None:
    step = MetaStep(model(), settings()).eval()
    together = float(step(batch((4, 7)))[0].detach())
    separate = [float(step(batch((e,)))[0].detach()) for e in (4, 7)]
    assert together == pytest.approx(np.mean(separate), rel=1e-12)
    swapped = float(step(batch((7, 4)))[0].detach())
    assert swapped == pytest.approx(together, rel=1e-12)


def test_step_depends_on_seed_and_episode_and_not_on_the_global_random_state() -> None:
    net = model(torch.float32)
    step = MetaStep(net, settings()).eval()
    first = step(batch())[0]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(first, step(batch())[0])
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, MetaStep(net, settings(seed=1)).eval()(batch())[0])
    same_images = SetBatch(batch().images, np.array([4, 8]), step=0)
    assert not torch.equal(first, step(same_images)[0])


def test_decode_samples_are_decoded() -> None:
    net = model()
    decoded = []
    net.decoder.register_forward_pre_hook(lambda module, args: decoded.append(args[0].shape[0]))
    for count in (1, 3, 4):
        MetaStep(net, settings(decode_samples=count)).eval()(batch())
    assert decoded == [B * M, 3 * B * M, 4 * B * M]


def test_channels_last_gives_the_same_loss() -> None:
    net = model()
    default = MetaStep(net, settings()).eval()(batch())[0]
    channels_last = MetaStep(net, settings(channels_last=True)).eval()(batch())[0]
    assert torch.allclose(default, channels_last, rtol=1e-12)


def test_em_and_densities_are_float32_under_bfloat16_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(z: Tensor, rows: Tensor, iterations: int) -> Any:
        calls.append((z.dtype, torch.is_autocast_enabled("cpu")))
        return fit_mixture(z, rows, iterations)

    monkeypatch.setattr(metagmvae.training.methods.meta_step, "fit_mixture", spy)
    net = model(torch.float32)
    loss, terms = MetaStep(net, settings(precision="bfloat16")).eval()(batch())
    assert calls == [(torch.float32, False)]
    assert loss.dtype == torch.float32
    assert {value.dtype for value in terms.values()} == {torch.float32}
    exact = MetaStep(net, settings()).eval()(batch())[0]
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.02)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_precision_is_bfloat16_where_it_is_fast(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(metagmvae.training.device.precision, "bfloat16_is_fast", lambda device_type: fast)
    net = model(torch.float32)
    kinds = ("auto", "bfloat16", "float32")
    loss = {kind: MetaStep(net, settings(precision=kind)).eval()(batch())[0] for kind in kinds}
    assert loss["auto"] == loss["bfloat16" if fast else "float32"]
    assert loss["bfloat16"] != loss["float32"]


def test_bfloat16_is_fast_with_cpu_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fast in (("avx512_bf16", True), ("amx_bf16", True), ("avx2", False)):
        metagmvae.training.device.precision.bfloat16_is_fast.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        assert metagmvae.training.device.precision.bfloat16_is_fast("cpu") is fast
    metagmvae.training.device.precision.bfloat16_is_fast.cache_clear()


def test_more_components_than_distinct_samples_is_an_error() -> None:
    """All samples of a point are equal if the posterior variance underflows to zero."""
    net = model()
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias[2:] = -2000.0
    step = MetaStep(net, settings()).eval()
    step.explain_failure()
    loss, _ = step(batch())
    assert loss.isnan()
    with pytest.raises(MixtureError, match="3 components need as many distinct points"):
        step.explain_failure()
    with torch.no_grad():  # equal points that are no numbers have another reason
        net.head.bias.fill_(float("nan"))
    assert step(batch())[0].isnan()
    step.explain_failure()


def test_keyed_generators_depend_on_every_part_of_the_key() -> None:
    cpu = torch.device("cpu")
    keys: list[tuple[int | str, ...]] = [
        (0, "a", 1),
        (1, "a", 1),
        (0, "b", 1),
        (0, "a", 2),
        (0, "a", 11),
        (0,),
    ]
    draws = [tuple(torch.randint(0, 2**40, (4,), generator=keyed_generator(cpu, *key)).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    repeated = torch.randint(0, 2**40, (4,), generator=keyed_generator(cpu, *keys[0]))
    assert tuple(repeated.tolist()) == draws[0]


# --- features of a frozen encoder instead of images -------------------------------------------------------


def feature_batch(net: MetaGMVAE, episodes: tuple[int, ...] = (4, 7)) -> SetBatch:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(len(episodes), M, net.encoder.feature_dim, generator=generator, dtype=torch.float64)
    return SetBatch(net.scale(raw).numpy(), np.array(episodes, dtype=np.int64), step=0)


def test_step_on_features_equals_eq_3_with_calibrated_variance() -> None:
    """Rybkin et al. 2020: the variance is the mean squared error of the reconstructions of an episode."""
    net = model(reconstruct="features")
    sets = feature_batch(net)
    loss, terms = MetaStep(net, settings(decode_samples=2, seed=5)).eval()(sets)
    elbos, reconstructions = [], []
    for b, episode in enumerate(sets.episodes):
        generator = keyed_generator(torch.device("cpu"), 5, "meta", int(episode))
        noise = torch.randn(M, 4, 2, generator=generator)
        h = torch.tensor(sets.images[b])
        with torch.no_grad():
            mean, log_variance = (part[0] for part in net.posterior(h[None]))
            z = mean[:, None] + (0.5 * log_variance).exp()[:, None] * noise
            decoded = net.decode(z[:, :2].flatten(0, 1)).unflatten(0, (M, 2)).numpy()
        rows = init_indices(z.flatten(0, 1)[None], 3, [generator])[0]
        weights, means = reference.em(z.flatten(0, 1).numpy(), rows.tolist(), 3)
        variance = np.mean([(h[j].numpy() - decoded[j, r]) ** 2 for j in range(M) for r in range(2)])
        total = 0.0
        for j in range(M):
            for r in range(2):
                shape = np.full(len(h[j]), variance)
                total += reference.gaussian_log_density(h[j].numpy(), decoded[j, r], shape) / 2
        reconstructions.append(total / M)
        for j in range(M):
            for point in z[j].numpy():
                total += reference.mixture_log_density(point, weights, means) / 4
                q = (mean[j].numpy(), log_variance[j].exp().numpy())
                total -= reference.gaussian_log_density(point, *q) / 4
        elbos.append(total)
    assert float(loss.detach()) == pytest.approx(-reference.batch_objective(elbos), rel=1e-8)
    assert float(terms["reconstruction"]) == pytest.approx(np.mean(reconstructions), rel=1e-8)


def test_step_on_features_trains_everything_but_the_encoder() -> None:
    net = model(reconstruct="features")
    step = MetaStep(net, settings()).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    step(feature_batch(net))[0].backward()
    after = net.state_dict()
    frozen = [name for name in before if name.startswith(("encoder.", "scale."))]
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not net.encoder.training
    assert not any(p.requires_grad for p in net.encoder.parameters())  # DDP waits for their gradients otherwise
    assert net.decoder.training
    trained = {name for name, p in net.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in net.named_parameters() if not name.startswith("encoder.")}
