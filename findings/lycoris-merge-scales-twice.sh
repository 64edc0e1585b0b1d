#!/usr/bin/env bash
# LyCORIS 4.1.3 merges a LoHa or a LoKr with the square of its scale, so that the merged layer is not the trained one.
#
# Guess: `merge_to` gives the layer that `apply_to` computes, for each method and each alpha. Observed: so it is for a
# LoCon. For a LoHa, and for a LoKr with a low-rank factor, the merged change is alpha / rank times the one that
# training saw: a quarter of it for alpha 1 and rank 4. If alpha is the rank, nothing is wrong, which hides it.
# Exits with 1 if a newer version behaves differently.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 lycoris-lora==4.1.3

"$folder/venv/bin/python" - <<'PYTHON'
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

RANK = 4
torch.manual_seed(0)
rows = torch.randn(3, 64)


@torch.no_grad()
def merged_to_applied(method, alpha):
    """How many times as large the merged change of a layer is as the applied one."""
    layer = torch.nn.Linear(64, 64, bias=False)
    before = layer(rows)
    adapter = method("layer", layer, lora_dim=RANK, alpha=alpha, **({"factor": 4} if method is LokrModule else {}))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    adapter.apply_to()
    applied = layer(rows) - before
    adapter.restore()
    adapter.merge_to()
    ratios = (layer(rows) - before) / applied
    assert float(ratios.std()) < 1e-3, "the change is scaled, not another one"
    return float(ratios.mean())


found = {
    (method.__name__, alpha): round(merged_to_applied(method, alpha), 3)
    for method in (LoConModule, LohaModule, LokrModule)
    for alpha in (RANK, 1)
}
for (name, alpha), ratio in found.items():
    print(f"{name} of rank {RANK} with alpha {alpha}: merged is {ratio} times the applied change")
expected = [1, 1, 1, 1 / RANK, 1, 1 / RANK]
raise SystemExit(list(found.values()) != expected)
PYTHON
