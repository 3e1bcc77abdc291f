"""Wrong answers to the exercises of lesson 8, each with a different mistake."""

WRONG = {
    "swiglu_width": [
        lambda n_embd, multiple: 4 * n_embd,
        lambda n_embd, multiple: 8 * n_embd // 3 // multiple * multiple,
        lambda n_embd, multiple: 2 * n_embd // 3 // multiple * multiple,
        lambda n_embd, multiple: 8 * n_embd // 3,
        lambda n_embd, multiple: (8 * n_embd // 3 // multiple + 1) * multiple,
        lambda n_embd, multiple: 8 * n_embd / 3,
    ],
    "pre_norm_block": [
        lambda x, n1, attention, n2, mlp: mlp(n2(attention(n1(x)))),
        lambda x, n1, attention, n2, mlp: n2(n1(x + attention(x)) + mlp(n1(x + attention(x)))),
        lambda x, n1, attention, n2, mlp: x + attention(n1(x)) + mlp(n2(x)),
        lambda x, n1, attention, n2, mlp: mlp(n2(x + attention(n1(x)))),
        lambda x, n1, attention, n2, mlp: x + mlp(n2(x + attention(n1(x)))),
        lambda x, n1, attention, n2, mlp: x + attention(x) + mlp(x + attention(x)),
    ],
    "relu_squared_write": [
        lambda n_embd, n_inner, sigma, sigma_w: n_inner * 3 * (n_embd * sigma**2) ** 2 * sigma_w**2,
        lambda n_embd, n_inner, sigma, sigma_w: n_inner * n_embd * sigma**2 / 2 * sigma_w**2,
        lambda n_embd, n_inner, sigma, sigma_w: n_inner * 1.25 * (n_embd * sigma**2) ** 2 * sigma_w**2,
        lambda n_embd, n_inner, sigma, sigma_w: n_inner * 1.5 * n_embd * sigma**4 * sigma_w**2,
        lambda n_embd, n_inner, sigma, sigma_w: n_inner * 1.5 * (n_embd * sigma**2) ** 2 * sigma_w,
        lambda n_embd, n_inner, sigma, sigma_w: 1.5 * (n_embd * sigma**2) ** 2 * sigma_w**2,
    ],
}
