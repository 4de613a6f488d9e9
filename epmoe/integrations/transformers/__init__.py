"""transformers' models with epmoe's experts. Importing this registers all of it (docs/transformers.md):

    experts_implementation="epmoe"       epmoe's products, from the model's own weights                  experts.py
    quantization_config=EpmoeConfig()    experts in MXFP4: kept as stored, or quantised on load          quantizer.py
    ep_implementation="slots"            sums that do not depend on the number of ranks                  parallel.py
    expert_parallel(config, ranks)       the distributed_config that splits nothing but the experts      parallel.py

    fit.py      which experts modules these serve, and how their weights lie
    packed.py   the module that takes such a module's place: its experts in MXFP4

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=EpmoeConfig())

`generate` and `save_pretrained` are transformers' own. The package's extra `transformers` brings what this needs.
"""

from epmoe.integrations.transformers.release import RELEASE  # first: an older release lacks what the others import

# isort: split
from epmoe.integrations.transformers.experts import epmoe_experts
from epmoe.integrations.transformers.packed import PackedExperts
from epmoe.integrations.transformers.parallel import SlotsParallel, expert_parallel
from epmoe.integrations.transformers.quantizer import EpmoeConfig, EpmoeQuantizer, replace_with_epmoe_experts

__all__ = [
    "RELEASE",
    "EpmoeConfig",
    "EpmoeQuantizer",
    "PackedExperts",
    "SlotsParallel",
    "epmoe_experts",
    "expert_parallel",
    "replace_with_epmoe_experts",
]
