"""The sampler once more, slow and obvious, with every option; and settings and starts that several tests use.

Unlike plain.py it runs the fast model, which plain.py checks: what differs is the sampling.
Shape legend: B images, L tokens.
"""

import copy
import dataclasses
import math

import torch
from scipy.stats import qmc

from enat.config import ENATConfig
from references import plain

SEARCHED = {
    "num_steps": 4,
    "mask_ratios": (0.9, 0.5, 0.3, 0.0),
    "guidance_scales": (1.0, 4.0, 0.5, 2.0),
    "sampling_temperatures": (1.5, 3.0, 0.0, 0.4),
    "remask_temperatures": (4.0, 0.0, 2.0, 7.0),
}
HALTON = {"reveal_order": "halton", "remask_temperature": 0.0, "mask_schedule": "arccos"}
RANDOM = {"reveal_order": "random", "remask_temperature": 0.0}
MOMENT = {"reveal_order": "moment", "sampling_temperature": 2.0}
REMASKED = {"remask_ratio": 0.3, "num_steps": 6}
PLAIN = {"encoder_layers": 0, "decoder_layers": 4, "decoder_attention": "full", "reuse": False}
LOCAL = {"local_steps": 2, "num_steps": 8, "guidance_schedule": "constant"}
BOUNDED = {"entropy_bound": 8.0, "num_steps": 6}


def some_start(config: ENATConfig, num_given: int, num_images: int = 3, seed: int = 0) -> torch.Tensor:
    """Random codes at num_given positions of each image, other ones in every image."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(config.codebook_size, (num_images, config.num_tokens), generator=generator)
    rank = torch.rand(codes.shape, generator=generator).argsort(dim=1).argsort(dim=1)
    return codes.masked_fill(rank >= num_given, config.mask_id)


RATIOS = {
    "cosine": lambda p: math.cos(p * math.pi / 2),
    "arccos": lambda p: 2 / math.pi * math.acos(p),
    "linear": lambda p: 1 - p,
    "square": lambda p: 1 - p * p,
    "cubic": lambda p: 1 - p * p * p,
    "square_root": lambda p: 1 - p**0.5,
}


def ratio_left(config, step):
    if step == config.num_steps - 1:
        return 0.0
    return config.mask_ratios[step] if config.mask_ratios else RATIOS[config.mask_schedule]((step + 1) / config.num_steps)


def strength(config, step):
    """s = w - 1, as published."""
    if config.guidance_scales:
        return config.guidance_scales[step] - 1
    share = step / config.num_steps
    if share < config.guidance_interval[0] or share >= config.guidance_interval[1]:
        return 0.0
    share = {"linear": share, "constant": 1, "power_cosine": (1 - math.cos(math.pi * share**config.guidance_power)) / 2}
    return (config.guidance_scale - 1) * share[config.guidance_schedule]


def temperature(config, step, kind):
    values, start = getattr(config, f"{kind}_temperatures"), getattr(config, f"{kind}_temperature")
    if values:
        return values[step]
    falls = getattr(config, f"{kind}_temperature_schedule") == "linear"
    return max(start * (1 - (step + 1) / config.num_steps) if falls else start, 1e-3 if start else 0)  # 0 is asked for, never met


def draw(log_probs, temperature, uniform, top_k, top_p):
    """One code. Among all codes from the first on; where some are left out, from the most likely on."""
    if temperature == 0:
        return int(log_probs.argmax())
    probs = (log_probs / temperature).softmax(dim=0).tolist()
    codes = list(range(len(probs)))
    if (top_k is not None and top_k < len(probs)) or top_p < 1:
        codes.sort(key=lambda code: -log_probs[code].item())
        codes = codes[:top_k]
        total, nucleus = sum(probs[code] for code in codes), []
        while sum(probs[code] for code in nucleus) < top_p * total and len(nucleus) < len(codes):
            nucleus.append(codes[len(nucleus)])
        codes = nucleus
    running, total = 0.0, sum(probs[code] for code in codes)
    for code in codes:
        running += probs[code]
        if running > uniform * total:
            return code
    return codes[-1]


def drawn_after_choosing(log_probs, temperature, order_temperature, uniform, top_k, top_p):
    """A code, and the confidence that chooses its position, from the sum over all codes."""
    if temperature == 0:
        return int(log_probs.argmax()), log_probs.max().item()
    scale = max(order_temperature, 1e-3)
    weights = (log_probs / temperature).log_softmax(dim=0) + log_probs / scale
    confidence = scale * (math.log(sum(math.exp(w - weights.max()) for w in weights.tolist())) + weights.max().item())
    return draw(weights, 1.0, uniform, top_k, top_p), confidence


def halton(grid_size):
    points = qmc.Halton(2, scramble=False).random(60 * grid_size**2)[1:]
    cells = (points * grid_size + 1e-9).astype(int)
    return list(dict.fromkeys((cells[:, 0] * grid_size + cells[:, 1]).tolist()))


def without_later_layers(model, num_layers):
    """The same weights with the first layers of the encoder, or without an encoder of the decoder."""
    guide = copy.deepcopy(model)
    name = "encoder" if len(model.encoder) else "decoder"
    setattr(guide, name, getattr(guide, name)[:num_layers])
    return guide


def plain_stack(model, tokens, condition, positions, kept, layers=None):
    """Plain NAT on one image, from the description: tokens at `positions` attend to themselves and to the keys and values in `kept`
    of all other tokens. -> logits (L, V), those after `layers` blocks, and keys and values of every block, (T + L, 2 D)."""
    config, head = model.config, model.head
    text = torch.zeros(0, config.embed_dim)
    if config.text_width is None:
        embedding = model.label_embedding.weight[condition]
    else:
        embedding, text = (
            plain.linear(model.pooled_projection, condition.pooled),
            plain.linear(model.text_projection, condition.hidden),
        )
    condition, rows = embedding * torch.sigmoid(embedding), len(text) + torch.tensor(positions)
    x = plain.layer_norm(model.embedding_norm, model.token_embedding.weight[tokens] + model.position_embedding.weight, 1e-6)
    x, made, early = x[positions], [], None

    def logits(features):
        hidden = plain.gelu_exact(plain.linear(head.dense, plain.layer_norm(head.norm_in, features, 1e-5)))
        scores = plain.layer_norm(head.norm_out, hidden, 1e-5) @ model.token_embedding.weight.t() + head.bias
        return torch.zeros(len(tokens), config.codebook_size).index_copy(0, torch.tensor(positions), scores[:, :-1])

    for number, weights in enumerate(model.decoder):
        early = logits(x) if number == layers else early
        numbers = plain.linear(weights.modulation, condition).split(config.embed_dim)
        shift, scale, *of_text, gate, shift_mlp, scale_mlp, gate_mlp = numbers
        own = plain.normalize(x, 1e-6) * (1 + scale) + shift
        if kept is None:
            both = torch.zeros(len(text) + len(tokens), 2 * config.embed_dim)
            if len(text):
                modulated = plain.normalize(text, 1e-6) * (1 + of_text[1]) + of_text[0]
                both[: len(text)] = plain.linear(weights.attention.key_value_conditioning, modulated)
        else:
            both = kept[number].clone()
        both[rows] = plain.linear(weights.attention.key_value_own, own)
        made.append(both)
        key, value = both.split(config.embed_dim, dim=1)
        query = plain.linear(weights.attention.query, own)
        if weights.attention.query_norm is not None:
            query = plain.normalize_heads(weights.attention.query_norm, query, config.num_heads)
            key = plain.normalize_heads(weights.attention.key_norm, key, config.num_heads)
        x = x + gate * plain.linear(weights.attention.project, plain.attend(query, key, value, config.num_heads))
        hidden = plain.linear(weights.mlp.fc1, plain.normalize(x, 1e-6) * (1 + scale_mlp) + shift_mlp)
        x = x + gate_mlp * plain.linear(weights.mlp.fc2, plain.gelu_tanh(hidden))
    return logits(x), early, made


class PlainLocal:
    """Predictions of plain NAT with local steps for one image: conditional and unconditional, each with what its full step left."""

    def __init__(self, model, condition, config, guide):
        self.config, self.own, self.kept = config, None, {}
        away = (model, plain.rows(model.null_condition(1))[0]) if guide is None else (guide, condition)
        self.passes = {"cond": (model, condition), "uncond": away}

    def __call__(self, step, tokens):
        """Guided logits (L, V)."""
        is_full = is_full_step(self.config, step)
        positions = [*range(len(tokens))] if is_full else self.own
        logits, early = {}, None
        for name, (model, condition) in self.passes.items():
            kept = None if is_full else self.kept[name]
            logits[name], at_layer, made = plain_stack(model, tokens, condition, positions, kept, self.config.guide_layers)
            early = at_layer if name == "cond" else early
            if is_full:
                self.kept[name] = made
        guide = early if self.config.guide_layers is not None else logits["uncond"]
        return logits["cond"] + strength(self.config, step) * (logits["cond"] - guide)


def is_full_step(config, step):
    return step < config.local_start or (step - config.local_start) % (config.local_steps + 1) == 0


def tokens_left(config, step, num_made, num_tokens):
    num_left = math.floor(num_made * ratio_left(config, step))
    if num_made < num_tokens and step < config.num_steps - 1:  # to the nearest, so that few are not all drawn at once
        num_left = max(1, math.floor(num_made * ratio_left(config, step) + 0.5))
    return num_left


def num_beyond(config, step, log_probs, priority):
    """Tokens of one image that stay masked: those of the lowest priority, from the first that takes more than the bound on."""
    if step == config.num_steps - 1:
        return 0
    chosen = []
    for position in sorted((p for p in range(len(priority)) if priority[p] < math.inf), key=lambda p: -priority[p].item()):
        here = log_probs[position]
        chosen.append(-sum(math.exp(value) * value for value in here.tolist()))
        if len(chosen) > 1 and sum(chosen) - max(chosen) > config.entropy_bound:
            chosen.pop()
            break
    return int((priority < math.inf).sum()) - len(chosen)


@torch.no_grad()
def reference_sample(model, labels, config, seeds, start=None, guide=None):
    """All positions are predicted, drawn and ranked at every step, with both passes; visible tokens are then restored."""
    if config.entropy_bound is not None and len(labels) > 1:
        starts = [start[row : row + 1] if start is not None else None for row in range(len(labels))]
        rows = [(labels[row : row + 1], config, seeds[row : row + 1], starts[row]) for row in range(len(labels))]
        return torch.cat([reference_sample(model, *row, guide) for row in rows])
    (num_images, num_tokens), mask_id = (len(labels), model.config.num_tokens), model.config.mask_id
    tokens = start.clone() if start is not None else torch.full((num_images, num_tokens), mask_id)
    num_made = int((tokens[0] == mask_id).sum())
    shape, side = (config.num_steps, 3 if config.remask_ratio else 2, num_tokens), model.config.grid_size
    noise = torch.stack([torch.rand(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    cond = uncond = None
    given, order = tokens != mask_id, halton(side)
    local = [PlainLocal(model, each, config, guide) for each in plain.rows(labels)] if config.local_steps else []
    for step in range(config.num_steps):
        mask = tokens == mask_id
        reuses = config.reuse and model.config.reuse
        before, cond = cond, model(tokens, labels, cond if reuses else None)
        logits = cond.logits
        if config.guide_layers is not None:
            early = without_later_layers(model, config.guide_layers)(tokens, labels, before if reuses else None)
            logits = logits + strength(config, step) * (logits - early.logits)
        elif guide is not None:
            uncond = guide(tokens, labels, uncond if config.reuse and guide.config.reuse else None)
            logits = logits + strength(config, step) * (logits - uncond.logits)
        elif model.config.is_conditional:
            uncond = model(tokens, model.null_condition(num_images), uncond if reuses else None)
            logits = logits + strength(config, step) * (logits - uncond.logits)
        if config.local_steps:
            logits = torch.stack([each(step, row) for each, row in zip(local, tokens, strict=True)])
        log_probs = logits.double().log_softmax(dim=-1)
        codes, priority = torch.zeros_like(tokens), torch.zeros(tokens.shape, dtype=torch.float64)
        for image in range(num_images):
            for position in range(num_tokens):
                uniform, gumbel = noise[image, step, 0, position].item(), -math.log(-math.log(noise[image, step, 1, position]))
                here = log_probs[image, position]
                by_order = temperature(config, step, "remask")
                if config.reveal_order == "moment":
                    code, confidence = drawn_after_choosing(
                        here, temperature(config, step, "sampling"), by_order, uniform, config.top_k, config.top_p
                    )
                else:
                    code = draw(here, temperature(config, step, "sampling"), uniform, config.top_k, config.top_p)
                    confidence = here[code]
                codes[image, position] = code
                priority[image, position] = confidence + by_order * gumbel
                if config.reveal_order == "random":
                    priority[image, position] = noise[image, 0, 1, position].item()
                if config.reveal_order == "halton":
                    down, right = (int(u * side) for u in noise[image, 0, 1, :2].tolist()) if config.halton_shift else (0, 0)
                    row, column = divmod(position, side)
                    priority[image, position] = -order.index((row - down) % side * side + (column - right) % side)
        for image, each in enumerate(local):
            if is_full_step(config, step):
                last = step
                while last + 1 < config.num_steps and not is_full_step(config, last + 1):
                    last += 1
                masked = sorted(mask[image].nonzero()[:, 0].tolist(), key=lambda at: priority[image, at].item())
                num_others = tokens_left(config, last, num_made, num_tokens) if config.local_tokens == "group" else 0
                each.own, each.priority = sorted(masked[num_others:]), priority[image].clone()
            else:
                if config.local_tokens == "group":
                    priority[image] = each.priority
                others = [at for at in range(num_tokens) if at not in each.own]
                priority[image, others] = -math.inf
        priority[~mask] = math.inf
        tokens = torch.where(mask, codes, tokens)
        num_left = tokens_left(config, step, num_made, num_tokens)
        if config.entropy_bound is not None:
            num_left = num_beyond(config, step, log_probs[0], priority[0])
        tokens.scatter_(1, priority.argsort(dim=1)[:, :num_left], mask_id)
        if not num_left:
            break
        if config.remask_ratio and step < config.num_steps - 1:
            again = masked_again(config, noise[:, step, 2], ~mask & ~given)
            tokens = tokens.masked_fill(again, mask_id)
            cond, uncond = (
                each and dataclasses.replace(each, mask=each.mask | again, num_masked=int((each.mask | again)[0].sum()))
                for each in (cond, uncond)
            )
    return tokens


def masked_again(config, noise, candidates):
    """Which tokens are masked again: of the candidates of each image, the share with the lowest noise."""
    again = torch.zeros_like(candidates)
    for image, choice in enumerate(candidates):
        positions = sorted(choice.nonzero()[:, 0].tolist(), key=lambda position: noise[image, position].item())
        again[image, positions[: math.floor(config.remask_ratio * len(positions))]] = True
    return again
