"""Literal, slow transcriptions of the paper's equations, against which the training tests compare the package.

Lee et al., "Meta-GMVAE", ICLR 2021, and Chen et al., "SimCLR", ICML 2020. Plain loops over Python numbers and small
float64 arrays, one symbol of the paper at a time: nothing is broadcast over points or components, no expression is
expanded or shifted for speed or accuracy. `test_reference.py` checks them against SciPy and closed forms.

Notation: M data points, N Monte Carlo samples, R decoded samples, P points, K components or classes, T labelled points
per class, Q queries, D latent size, F width.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def log_sum_exp(values: list[float]) -> float:
    """log sum_k exp(v_k), without overflow."""
    largest = max(values)
    return largest + math.log(sum(math.exp(v - largest) for v in values))


def gaussian_log_density(z: Array, mean: Array, variance: Array) -> float:
    """log N(z; mu, diag(sigma^2)), dimension by dimension."""
    total = 0.0
    for d in range(len(z)):
        total += -0.5 * math.log(2.0 * math.pi * variance[d])
        total += -((z[d] - mean[d]) ** 2) / (2.0 * variance[d])
    return total


def mixture_log_density(z: Array, weights: Array, means: Array) -> float:
    """log p_psi(z) = log sum_k pi_k N(z; mu_k, I)."""
    identity = np.ones(len(z))
    terms = []
    for k in range(len(means)):
        terms.append(math.log(weights[k]) + gaussian_log_density(z, means[k], identity))
    return log_sum_exp(terms)


def em_e_step(points: Array, weights: Array, means: Array) -> Array:
    """Eq. 7, E-step: Q_p(k), (P, K)."""
    identity = np.ones(points.shape[1])
    q = np.zeros((len(points), len(means)))
    for p in range(len(points)):
        joint = []
        for k in range(len(means)):
            joint.append(math.log(weights[k]) + gaussian_log_density(points[p], means[k], identity))
        evidence = log_sum_exp(joint)
        for k in range(len(means)):
            q[p, k] = math.exp(joint[k] - evidence)
    return q


def em_m_step(points: Array, q: Array) -> tuple[Array, Array]:
    """Eq. 7, M-step: (pi, mu), (K,) and (K, D)."""
    components = q.shape[1]
    means = np.zeros((components, points.shape[1]))
    counts = np.zeros(components)
    for k in range(components):
        for p in range(len(points)):
            means[k] += q[p, k] * points[p]
            counts[k] += q[p, k]
        means[k] /= counts[k]
    weights = np.zeros(components)
    for k in range(components):
        weights[k] = counts[k] / sum(counts)
    return weights, means


def em(points: Array, rows: list[int], iterations: int) -> tuple[Array, Array]:
    """EM of Eq. 7 with initial means at the given rows and initial weights 1/K: (pi, mu), (K,) and (K, D)."""
    means = np.stack([points[row] for row in rows])
    weights = np.full(len(rows), 1.0 / len(rows))
    for _ in range(iterations):
        weights, means = em_m_step(points, em_e_step(points, weights, means))
    return weights, means


def em_log_likelihood(points: Array, weights: Array, means: Array) -> float:
    """Eq. 6: sum_p log p_psi(z_p)."""
    return sum(mixture_log_density(z, weights, means) for z in points)


def class_posterior(z: Array, means: Array, variances: Array, temperature: float = 1.0) -> Array:
    """p_psi(y = k | z) by Bayes' rule under equal weights, (K,): E-step of Eq. 10, summand of Eq. 11.

    `temperature` is not in the paper: p(z | y)^(1 / temperature) instead of p(z | y).
    """
    terms = [gaussian_log_density(z, means[k], variances[k]) / temperature for k in range(len(means))]
    evidence = log_sum_exp(terms)
    return np.array([math.exp(term - evidence) for term in terms])


def semi_supervised_em(
    support: Array | list[Array],
    query: Array,
    iterations: int,
    e_step: str = "diagonal",
    floor: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """Eq. 10: (mu, sigma^2), (K, D) each.

    support: (T_k, D) for each class; query: (P, D). `e_step` "identity" is the E-step of the published code. `floor` is
    the smallest variance; the paper has none.
    """
    classes, size = len(support), query.shape[1]
    means = np.zeros((classes, size))
    for k in range(classes):
        for t in range(len(support[k])):
            means[k] += support[k][t] / len(support[k])
    variances = np.ones((classes, size))
    for _ in range(iterations):
        used = variances if e_step == "diagonal" else np.ones((classes, size))
        q = np.zeros((len(query), classes))
        for p in range(len(query)):
            q[p] = class_posterior(query[p], means, used, temperature)
        new_means, new_variances = np.zeros_like(means), np.zeros_like(variances)
        for k in range(classes):
            count = 0.0
            for t in range(len(support[k])):
                new_means[k] += support[k][t]
                count += 1.0
            for p in range(len(query)):
                new_means[k] += q[p, k] * query[p]
                count += q[p, k]
            new_means[k] /= count
            for t in range(len(support[k])):
                new_variances[k] += (support[k][t] - new_means[k]) ** 2
            for p in range(len(query)):
                new_variances[k] += q[p, k] * (query[p] - new_means[k]) ** 2
            for d in range(size):
                new_variances[k, d] = max(new_variances[k, d] / count, floor)
        means, variances = new_means, new_variances
    return means, variances


def semi_supervised_objective(support: Array, query: Array, means: Array, variances: Array) -> float:
    """The objective that Eq. 10 increases: sum_s log 1/K N(z_s; y_s) + sum_q log sum_k 1/K N(z_q; k)."""
    classes = len(means)
    total = 0.0
    for k in range(classes):
        for z in support[k]:
            total += gaussian_log_density(z, means[k], variances[k]) - math.log(classes)
    for z in query:
        terms = [gaussian_log_density(z, means[k], variances[k]) for k in range(classes)]
        total += log_sum_exp(terms) - math.log(classes)
    return total


def final_posterior(samples: Array, means: Array, variances: Array) -> Array:
    """Eq. 11: p(y_q | x_q, D) = 1/N sum_n p_psi*(y_q | z_q^(n)); samples (Q, N, D) -> (Q, K)."""
    queries, draws, _ = samples.shape
    result = np.zeros((queries, len(means)))
    for q in range(queries):
        for n in range(draws):
            result[q] += class_posterior(samples[q, n], means, variances) / draws
    return result


def bernoulli_log_likelihood(x: Array, probability: Array) -> float:
    """log p(x | z) = sum over pixels of x log p + (1 - x) log(1 - p)."""
    total = 0.0
    for value, p in zip(x.reshape(-1), probability.reshape(-1), strict=True):
        total += value * math.log(p) + (1.0 - value) * math.log(1.0 - p)
    return total


def elbo(
    x: Array,
    probability: Array,
    z: Array,
    q_mean: Array,
    q_variance: Array,
    weights: Array,
    means: Array,
    scale: str = "sum",
) -> float:
    """Eq. 3 for one episode, from the definitions of the three densities.

    x (M, ...) images; probability (M, R, ...) Bernoulli means of the first R samples; z (M, N, D) samples;
    q_mean, q_variance (M, D) of q(z | x, D); weights (K,), means (K, D) of psi*. `scale` "mean" divides by M.
    """
    points, draws, _ = z.shape
    decoded = probability.shape[1]
    total = 0.0
    for j in range(points):
        for r in range(decoded):
            total += bernoulli_log_likelihood(x[j], probability[j, r]) / decoded
        for n in range(draws):
            total += mixture_log_density(z[j, n], weights, means) / draws
            total -= gaussian_log_density(z[j, n], q_mean[j], q_variance[j]) / draws
    return total if scale == "sum" else total / points


def squared_error(x: Array, decoded: Array) -> float:
    """Reconstruction term of the published code for Mini-ImageNet: the summed squared error, without a factor."""
    total = 0.0
    for f in range(len(x)):
        total += (decoded[f] - x[f]) ** 2
    return total


def published_code_loss(
    h: Array, decoded: Array, z: Array, q_mean: Array, q_variance: Array, weights: Array, means: Array
) -> float:
    """Loss of the published code for Mini-ImageNet, for one episode: means over the M * N samples of both terms.

    h (M, F) features; decoded (M, N, F) reconstructions; the rest as in `elbo`.
    """
    points, draws, _ = z.shape
    reconstruction = divergence = 0.0
    for j in range(points):
        for n in range(draws):
            reconstruction += squared_error(h[j], decoded[j, n]) / (points * draws)
            log_q = gaussian_log_density(z[j, n], q_mean[j], q_variance[j])
            divergence += (log_q - mixture_log_density(z[j, n], weights, means)) / (points * draws)
    return reconstruction + divergence


def batch_objective(elbos: list[float]) -> float:
    """Eq. 9: the mean over the B episodes of a step."""
    return sum(elbos) / len(elbos)


def attention(query: Array, key: Array, value: Array, heads: int, scale: str) -> Array:
    """Multi-head attention (Vaswani et al. 2017) of one set, (M, F) each, heads side by side.

    `scale` "head" divides by sqrt(F / heads), "model" by sqrt(F).
    """
    points, width = query.shape
    size = width // heads
    divisor = math.sqrt(size) if scale == "head" else math.sqrt(width)
    result = np.zeros((points, width))
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for i in range(points):
            scores = []
            for j in range(points):
                scores.append(float(sum(query[i, part] * key[j, part])) / divisor)
            evidence = log_sum_exp(scores)
            for j in range(points):
                result[i, part] += math.exp(scores[j] - evidence) * value[j, part]
    return result


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """W x_i + b for each row: (M, in) -> (M, out)."""
    return np.stack([weight @ row + bias for row in x])


def activate(x: Array, name: str) -> Array:
    """ELU (alpha = 1) or ReLU, value by value."""
    result = np.zeros_like(x)
    for index, value in np.ndenumerate(x):
        if value > 0:
            result[index] = value
        elif name == "elu":
            result[index] = math.exp(value) - 1.0
    return result


def transformer_block(x: Array, w: dict[str, Array], heads: int, scale: str, activation: str) -> Array:
    """Table 3: TransformerEncoder without LayerNorm; `w` holds (weight, bias) as "query.weight" and so on."""
    q = linear(x, w["query.weight"], w["query.bias"])
    k = linear(x, w["key.weight"], w["key.bias"])
    v = linear(x, w["value.weight"], w["value.bias"])
    x = x + linear(attention(q, k, v, heads, scale), w["output.weight"], w["output.bias"])
    inner = activate(linear(x, w["inner.weight"], w["inner.bias"]), activation)
    return x + linear(inner, w["outer.weight"], w["outer.bias"])


def set_attention_block(x: Array, w: dict[str, Array], heads: int, scale: str, activation: str) -> Array:
    """Published code: residual on the projected query, then x + act(W x)."""
    q = linear(x, w["query.weight"], w["query.bias"])
    k = linear(x, w["key.weight"], w["key.bias"])
    v = linear(x, w["value.weight"], w["value.bias"])
    x = q + attention(q, k, v, heads, scale)
    return x + activate(linear(x, w["inner.weight"], w["inner.bias"]), activation)


def nt_xent(first: Array, second: Array, temperature: float) -> float:
    """SimCLR's Algorithm 1: z_{2k-1} and z_{2k} are the two views of image k (counted from 1)."""
    images = len(first)
    z = []
    for k in range(images):
        z += [first[k], second[k]]

    def similarity(i: int, j: int) -> float:
        return float(z[i] @ z[j]) / (math.sqrt(float(z[i] @ z[i])) * math.sqrt(float(z[j] @ z[j])))

    def loss(i: int, j: int) -> float:
        others = [similarity(i, k) / temperature for k in range(2 * images) if k != i]
        return -(similarity(i, j) / temperature - log_sum_exp(others))

    total = 0.0
    for k in range(images):
        total += loss(2 * k, 2 * k + 1) + loss(2 * k + 1, 2 * k)
    return total / (2 * images)
