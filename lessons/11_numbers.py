"""Numbers

What fails if numbers have only 16 bits, and how can a model train with them?
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(app_title="11. Numbers")

with app.setup(hide_code=True):
    import functools
    import math

    import marimo as mo
    import torch
    import torch.nn.functional as F

    from glassgpt.data.builtin_texts import python_docs
    from glassgpt.figures import heatmap, lines
    from glassgpt.interpretability.capture import capture
    from glassgpt.learn.catalog import find_lesson
    from glassgpt.learn.models import trained_model
    from glassgpt.utils.device import autocast

    FORMATS = {  # bits of exponent and of fraction
        "float32": (8, 23),
        "TF32": (8, 10),
        "bfloat16": (8, 7),
        "float16": (5, 10),
    }
    NUMBERS = {"0.1": 0.1, "257": 257.0, "259": 259.0}
    NUMBERS |= {"100,000": 1e5, "0.00000001": 1e-8}

    @functools.cache
    def documentation(length: int) -> str:
        """The first characters of the documentation that trains the model."""
        return "".join(python_docs())[:length]


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # 11. Numbers

    **What fails if numbers have only 16 bits, and how can a model train with them?**

    So far, each weight was a float32: a number of 32 bits. With 16 bits, only half the
    bytes move through memory (lesson 12). This lesson rounds numbers bit by bit, finds
    where short formats fail, and shows what training does about it.

    ## A number in bits

    A floating-point number is a number from 1 to below 2, times a power of two, with a
    sign: $6.5 = 1.625 \cdot 2^2$. A format stores one bit for the sign, $n_e$ bits for
    the *exponent* $e$, and $n_f$ bits for the *fraction* $f$. Both are whole numbers,
    and together they mean

    $$\pm \left(1 + \frac{f}{2^{n_f}}\right) \cdot 2^{e - b}$$

    The *bias* $b = 2^{n_e - 1} - 1$ makes negative powers possible. For 6.5 in
    float16, $b = 15$, $e = 17$ and $f = 0.625 \cdot 1024 = 640$. Two values of $e$ are
    special:

    - $e = 0$: the leading 1 is missing, $\pm \frac{f}{2^{n_f}} \cdot 2^{1 - b}$. So
      $f = 0$ is zero; the other numbers are called *subnormal*.
    - all bits of $e$ are 1: infinity if $f = 0$, otherwise NaN ("not a number").
    """)
    return


@app.function
def value_of(pattern: int, n_e: int, n_f: int) -> float:
    """The number that a pattern of 1 + n_e + n_f bits means."""
    e, f = pattern >> n_f & 2**n_e - 1, pattern & 2**n_f - 1
    b = 2 ** (n_e - 1) - 1
    if e == 2**n_e - 1:
        size = math.nan if f else math.inf
    elif e == 0:  # zero or subnormal
        size = f / 2**n_f * 2.0 ** (1 - b)
    else:
        size = (1 + f / 2**n_f) * 2.0 ** (e - b)
    return -size if pattern >> n_e + n_f else size


@app.cell(hide_code=True)
def _():
    text = (
        "| format | $n_e$ | $n_f$ | largest | smallest normal | smallest | gap at 1 |"
    )
    text += "\n" + "| --- " * 7 + "|\n"
    for name, (n_e, n_f) in FORMATS.items():
        one, infinity = 2 ** (n_e - 1) - 1 << n_f, 2**n_e - 1 << n_f
        patterns = (infinity - 1, 1 << n_f, 1, one + 1)
        limits = [value_of(pattern, n_e, n_f) for pattern in patterns]
        limits[-1] -= value_of(one, n_e, n_f)
        row = [name, str(n_e), str(n_f), *(f"{x:.5g}" for x in limits)]
        text += "| " + " | ".join(row) + " |\n"
        if name != "TF32":  # which is not a type of PyTorch's
            t = torch.finfo(getattr(torch, name))
            assert limits == [t.max, t.tiny, t.smallest_normal * t.eps, t.eps]
    assert value_of(17 << 10 | 640, 5, 10) == 6.5
    mo.md(text)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    bfloat16 is the first half of a float32: about its range, a coarse fraction. float16
    has a finer fraction and a small range. TF32 has the longer exponent and the longer
    fraction, in 19 bits. (float32 and float16 follow IEEE 754, 2008.)

    ## Rounding

    A float32 becomes the nearest number that the format has. Write its 1 and its
    fraction as one whole number of 24 bits, the *significand*. Cut off its last
    $23 - n_f$ bits. If the part that you cut off is more than half a unit of what
    remains, round up. If it is *exactly* half, choose the neighbour that is even, whose
    last bit is 0. If halves always went up, sums of positive numbers would be too big.

    Below the smallest normal number, the gaps stay as they are, so more bits are cut
    off. If rounding up carries beyond the fraction, the exponent increases by 1.
    """)
    return


@app.function
def to_bits(x: torch.Tensor, n_e: int, n_f: int) -> torch.Tensor:
    """The patterns (int32) of the numbers x (float32), rounded to a format."""
    bits = x.view(torch.int32)
    sign, e, f = bits >> 31 & 1, bits >> 23 & 255, bits & 2**23 - 1
    lowest = 129 - 2 ** (n_e - 1)  # float32's e of the format's smallest normal number
    significand, e = torch.where(e > 0, 2**23 + f, f), e.clamp(min=1)
    cut = (23 - n_f + (lowest - e).clamp(min=0)).clamp(max=25)  # 25: nothing is kept
    kept, unit = significand >> cut, 1 << cut
    twice = 2 * (significand & unit - 1)  # of what is cut off
    up = (twice > unit) | ((twice == unit) & (kept % 2 == 1))
    pattern = ((e - lowest).clamp(min=0) << n_f) + kept + up  # a carry raises e
    infinity = 2**n_e - 1 << n_f
    return (sign << n_e + n_f) + pattern.clamp(max=infinity) + x.isnan()


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    Does PyTorch do the same? We convert a million float32 numbers of random bits.
    PyTorch has no TF32 type. But its fraction is as long as float16's, so both must
    round equally where float16 is normal.
    """)
    return


@app.cell
def _():
    generator = torch.Generator().manual_seed(11)
    random = torch.randint(-(2**31), 2**31, (1_000_000,), generator=generator)
    x = random.int().view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        ours = to_bits(x, *FORMATS[str(dtype).removeprefix("torch.")])
        theirs, is_nan = x.to(dtype), x.isnan()
        assert torch.equal(ours.short()[~is_nan], theirs.view(torch.int16)[~is_nan])
        assert ours.short().view(dtype)[is_nan].isnan().all()
    normal = x[(x.abs() > 2**-14) & (x.abs() < 65504)]
    tf32 = (to_bits(normal, *FORMATS["TF32"]) << 13).view(torch.float32)
    assert torch.equal(tf32, normal.half().float())
    mo.md(f"No difference from PyTorch in {len(x):,} numbers, bit by bit.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    **Predict.** Which formats hold 0.1 exactly? And 257, which is 256 + 1? What becomes
    of 100,000 and of 0.00000001? Hatched cells are bits that the format does not have.
    """)
    return


@app.cell(hide_code=True)
def _():
    number = mo.ui.dropdown(options=NUMBERS, value="0.1", label="number")
    number
    return (number,)


@app.cell
def _(number):
    found, texts = {}, []
    for form, (e_bits, f_bits) in FORMATS.items():
        number_bits = to_bits(torch.tensor([number.value]), e_bits, f_bits).item()
        digits = f"{number_bits:0{1 + e_bits + f_bits}b}"
        texts.append(digits[0] + " " * (8 - e_bits) + digits[1:] + " " * (23 - f_bits))
        found[form] = value_of(number_bits, e_bits, f_bits)
    cells = [[math.nan if d == " " else int(d) for d in row] for row in texts]
    look = {"columns": "±" + "e" * 8 + "f" * 23, "rows": [*found], "form": ".0f"}
    heatmap(cells, texts=texts, title=f"{number.value:,.9g} in bits", **look)
    return (found,)


@app.cell(hide_code=True)
def _(found, number):
    items = [
        f"{form}: {value:,.9g} (error {value - number.value:.2g})"
        for form, value in found.items()
    ]
    assert found["float32"] != number.value or number.value > 1
    assert torch.tensor([257.0, 259.0]).bfloat16().tolist() == [256, 260]
    assert torch.tensor([1e5, 1e-8]).half().tolist() == [math.inf, 0]
    mo.Html(f"<p>{'<br>'.join(items)}</p>")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    - **0.1**: no format holds it, not even float32. Its binary digits never end.
    - **257**: in bfloat16, it lies halfway between 256 and 258. The last bit of 256 is
      0, so 256 + 1 is 256.
    - **259**: halfway between 258 and 260; now the last bit of 260 is 0.
    - **100,000** *overflows* in float16: it becomes infinity.
    - **0.00000001** *underflows* in float16: it becomes 0.

    ## Which format is more precise?

    Neighbours are $2^{e - b - n_f}$ apart. Rounding moves a number by at most half of
    that. Since a normal number is at least $2^{e - b}$, its relative error is at most
    $2^{-n_f - 1}$: $2^{-8} \approx 0.004$ for bfloat16, and $2^{-11} \approx 0.0005$
    for float16.

    **Predict.** At 1, float16 has the smaller error. At 0.000001 as well?
    """)
    return


@app.function
def largest_error(power: int, n_e: int, n_f: int) -> float:
    """Largest relative error of 300 numbers from 2^power to twice as much."""
    x = torch.linspace(1, 2, 301)[:-1] * 2.0**power
    patterns = to_bits(x, n_e, n_f).tolist()
    values = torch.tensor([value_of(p, n_e, n_f) for p in patterns])
    return ((values - x).abs() / x).max().item()


@app.cell
def _():
    powers, curves = range(-40, 40), {}
    for short in ("float16", "bfloat16"):
        errors = [largest_error(power, *FORMATS[short]) for power in powers]
        curves[short] = [2.0**power for power in powers], errors
        assert errors[40] <= 2.0 ** -(FORMATS[short][1] + 1)
    ratio = curves["float16"][1][20] / curves["bfloat16"][1][20]  # at 2^-20
    assert round(ratio) == 8
    heading = "Largest relative error of rounding"
    lines(curves, title=heading, x="number", log_x=True, log_y=True)
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    No: there, float16 is about 8 times worse. Below $2^{-14} \approx 0.00006$, its
    numbers are subnormal: the gap no longer shrinks, so the relative error grows up to
    1, where everything is lost. Beyond 65,504, the curve ends at infinity.

    ## A weight that does not move

    **Predict.** A weight is 1, and each of 1,000 updates adds 0.003. Exactly, it is 4
    in the end. What is it if it is stored in bfloat16? And in float16?
    """)
    return


@app.cell(hide_code=True)
def _():
    step = mo.ui.slider(
        steps=[0.0003, 0.001, 0.003, 0.01], value=0.003, label="update", show_value=True
    )
    step
    return (step,)


@app.function
def weights_after(update: float, dtype: torch.dtype, count: int = 1000) -> list[float]:
    """A weight that starts at 1, after each update, if it is stored as dtype."""
    weight, weights = torch.tensor(1.0), [1.0]
    for _ in range(count):
        weight = (weight + update).to(dtype).float()
        weights.append(weight.item())
    return weights


@app.cell
def _(step):
    stored = (torch.float32, torch.bfloat16, torch.float16)
    ends = [round(weights_after(0.003, each)[-1], 2) for each in stored]
    assert ends == [4.0, 1.0, 4.57]
    assert weights_after(0.01, torch.bfloat16)[-1] == 4
    half_way = weights_after(0.003, torch.float16)[500:502]
    assert round(half_way[1] - half_way[0], 4) == 0.0039
    paths = {str(d)[6:]: (range(1001), weights_after(step.value, d)) for d in stored}
    lines(paths, title=f"A weight, with updates of {step.value:g}", x="updates")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    In bfloat16, it stays 1: the gap above 1 is $2^{-7} \approx 0.008$, and 0.003 is
    less than half of it. In float16, it arrives at 4.57, too far: from 2 on, each
    addition of 0.003 is rounded to 0.0039. With updates of 0.01, bfloat16 moves, but
    stops at 4, where half a gap is 0.016. Whatever the weight is, bfloat16 loses each
    update below $2^{-9} \approx 0.002$ of it.

    So mixed-precision training (Micikevicius et al., 2018) keeps weights in float32,
    and rounds *copies* of them for products.

    Long sums fail in the same way: counting in bfloat16 stops at 256. Therefore,
    `sum()` adds short numbers in float32, and rounds once, at the end.
    """)
    return


@app.cell
def _():
    total = torch.tensor(0.0, dtype=torch.bfloat16)
    for _ in range(1000):
        total += 1
    at_once = torch.ones(1000, dtype=torch.bfloat16).sum()
    assert (total.item(), at_once.item()) == (256, 1000)
    mo.md(f"1,000 ones: {total:.0f} one by one, and {at_once:,.0f} with `sum()`.")
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Loss scaling

    Gradients are small. The loss is a mean over $N$ tokens, so its gradient by a logit
    is $(p - y) / N$: $p$ is the probability, and $y$ is 1 for the target, otherwise 0
    (lesson 9). In float16, numbers up to $2^{-25}$ become 0.

    *Loss scaling* multiplies the loss by $S$ before the backward pass. By the chain
    rule, this multiplies every gradient by $S$. Afterwards, the gradients are divided
    by $S$ in float32. A power of two changes only the exponent, so it adds no error.

    The next cell computes the gradients of a trained model for $N$ = 1,024 characters,
    and rounds them to float16.

    **Predict.** Which share of the logits' gradients becomes 0 without scaling? Is a
    larger $S$ always better?
    """)
    return


@app.function
def gradients(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of all logits and of all weights, flat, for ids (B, T + 1)."""
    logits = model.logits(model.hidden(ids[:, :-1]))  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    of_logits, *rest = torch.autograd.grad(loss, [logits, *model.parameters()])
    return of_logits.flatten(), torch.cat([each.flatten() for each in rest])


@app.cell
def _():
    model, tokenizer = trained_model()  # trained for some seconds, as in lesson 4
    ids = torch.tensor(tokenizer.encode(documentation(1040))).view(16, 65)
    of_logits, of_weights = gradients(model, ids)
    exponents = range(0, 33, 2)
    zero = [(of_logits * 2.0**k).half().eq(0).float().mean() for k in exponents]
    infinite = [(of_weights * 2.0**k).half().isinf().float().mean() for k in exponents]
    assert 0.1 < zero[0] < 0.3
    assert zero[8] == infinite[8] == 0  # at 2^16
    scales = [2.0**k for k in exponents]
    series = {
        "of logits: 0": (scales, zero),
        "of weights: infinite": (scales, infinite),
    }
    words = {"title": "Share of the gradients in float16", "x": "scale S"}
    lines(series, log_x=True, points=True, **words)
    return ids, model


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    About a fifth becomes 0. At $S = 2^{16} = 65{,}536$, nothing is lost in this
    example. Far above it, the weights' gradients overflow. (glassgpt's own loss divides
    by $N$ last, after the products, so fewer values are so small.)

    The best $S$ changes during training. PyTorch's `GradScaler` starts with $2^{16}$.
    If a gradient is infinite or NaN, it skips the update and halves $S$. After 2,000
    updates without this, it doubles $S$. bfloat16 has the range of float32, and needs
    no scaling.

    ## Autocast

    *Autocast* chooses the format per operation. Matrix products get 16-bit copies of
    their inputs. Operations that need precision, such as the cross-entropy, get
    float32. The others keep what they get; float32 plus bfloat16 gives float32. The
    next cell runs the model under the library's autocast, and computes one product by
    hand. Which tensors are bfloat16?
    """)
    return


@app.cell
def _(ids, model):
    with torch.no_grad(), capture(model) as cache:
        exact = model(ids[:, :-1], ids[:, 1:])
        with autocast(torch.device("cpu"), "bfloat16"):
            loss = model(ids[:, :-1], ids[:, 1:])
        block, layer = model.blocks[1], cache.layers[1]
        by_hand = F.linear(layer.mlp_post, block.feed_forward.down.weight.bfloat16())
    assert torch.equal(by_hand, layer.mlp_out)
    assert abs(loss - exact) < 0.01
    tensors = {"weight": block.feed_forward.down.weight, "residual": layer.resid_pre}
    tensors |= {"q, k, v": layer.q, "output of attention": layer.attn_out}
    tensors |= {"residual after attention": layer.resid_mid, "output of MLP": by_hand}
    tensors |= {f"loss: {loss:.4f} (float32: {exact:.4f})": loss}
    rows = [f"| {name} | {str(t.dtype)[6:]} |" for name, t in tensors.items()]
    mo.md("\n".join(["| tensor of layer 1 | format |", "| --- | --- |", *rows]))
    return


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    ## Tensor cores

    *Tensor cores* are units of NVIDIA's GPUs that multiply small matrices. Those of the
    V100 take float16 and can add in float32 (NVIDIA's V100 whitepaper, 2017). Those of
    the A100 also take bfloat16 and TF32 (A100 whitepaper, 2020). With TF32, tensors
    stay float32; only the inputs of products are shortened. This lesson runs on a CPU
    and measures none of this.

    ## What to remember

    - Exponent bits give range, fraction bits give precision.
    - bfloat16 has the range of float32. float16 is finer, but overflows and underflows.
    - An update below half a gap is lost: keep weights and sums in float32.
    - float16 needs loss scaling; bfloat16 does not.
    - Autocast uses 16 bits for products, not for everything.

    ## Exercises

    Write your answers with `glassgpt learn 11 --exercises answers.py`, and check them
    with `glassgpt learn check answers.py`.
    """)
    return


@app.cell(hide_code=True)
def _():
    mo.md(find_lesson("11").exercises_as_markdown())
    return


if __name__ == "__main__":
    app.run()
