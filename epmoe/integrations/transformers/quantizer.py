"""`EpmoeConfig`: transformers' quantiser whose experts stay in MXFP4, or go into it on load, matrix by matrix.

A checkpoint that stores MXFP4 (gpt-oss, or what `save_pretrained` wrote) is read as it is, for this rank's experts
only under expert parallelism. From any other the loader brings one matrix of one layer, merged out of the experts' own
tensors where the checkpoint has those; it is quantised and let go before the next one is read.

What `save_pretrained` writes: blocks and scales by the names of packed.py, experts gathered from all ranks. gpt-oss's
say quant_method mxfp4 in config.json, and are a checkpoint like OpenAI's; others say epmoe, and load again wherever
this package has been imported.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from epmoe.errors import UserError, warn
from epmoe.integrations.transformers.experts import NAME
from epmoe.integrations.transformers.fit import PROJECTIONS, UnfitError, layout_of
from epmoe.integrations.transformers.packed import BLOCKS, SCALES, PackedExperts

STORED_METHOD = "mxfp4"  # quant_method of gpt-oss's checkpoints


@register_quantization_config(NAME)
class EpmoeConfig(QuantizationConfigMixin):
    """How `from_pretrained(path, quantization_config=EpmoeConfig())` brings experts into MXFP4.

    Args:
        modules_to_not_convert: names of modules that stay as they are, each an experts module or what holds it, as in
            transformers: from the beginning, from the end, or a regular expression ("model.layers.0", "layers.*").
        experts: the backend that runs them: auto, triton, reference, or package.module:Class. Not saved.
        quant_method: epmoe; config.json says so.
    """

    def __init__(
        self, modules_to_not_convert: list[str] | None = None, experts: str = "auto", quant_method: str = NAME
    ) -> None:
        if quant_method != NAME:
            raise UserError(f"EpmoeConfig: quant_method={quant_method!r}: leave it out, it is {NAME}")
        self.quant_method = NAME
        self.modules_to_not_convert, self.experts = modules_to_not_convert, experts
        self.written = NAME  # the quant_method that `save_pretrained` writes
        self.asked: list[str] = []  # of modules_to_not_convert, those that a checkpoint's own config.json has not

    def to_dict(self) -> dict[str, Any]:
        """What config.json keeps."""
        return {"quant_method": self.written, "modules_to_not_convert": self.modules_to_not_convert}


class Quantize(ConversionOps):
    """A matrix that the loader has read → blocks and scales, in its parameter's place."""

    def convert(self, input_dict: dict[str, Any], **given: Any) -> dict[str, torch.Tensor]:
        """{any name: the tensor, or a list of it} → {full name: uint8 tensor}, for this rank's experts."""
        (value,) = input_dict.values()
        name = given["full_layer_name"]
        module, projection = get_module_from_name(given["model"], name)
        found = module.quantize(projection, value[0] if isinstance(value, list) else value)
        module.placeholder_gone(projection)
        given["missing_keys"].discard(name)
        prefix = name.removesuffix(projection)
        return {prefix + stored: tensor for stored, tensor in found.items()}


@register_quantizer(NAME)
class EpmoeQuantizer(HfQuantizer):
    """Puts `PackedExperts` in the experts' places before weights are read, and lets their backends settle after."""

    quantization_config: EpmoeConfig
    # Of the parameters that go as they are quantised: what comes of them has parameters, and bytes, of its own.
    quantized_element_size = 0.0
    serialized_names = {name: [name + BLOCKS, name + SCALES] for name in PROJECTIONS}  # noqa: RUF012 (the base's own)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The same.

        Raises:
            UserError: one that epmoe's backends do not run.
        """
        if dtype == torch.float16:
            raise UserError(f"EpmoeConfig: dtype={dtype}: these experts run bfloat16 or float32: load with one of them")
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **given: Any) -> None:
        replace_with_epmoe_experts(model, self.quantization_config, stored=self.pre_quantized)
        self.know(model)

    def know(self, model: Any) -> None:
        """What the model's files will say: a whole gpt-oss is one that others read, too."""
        layouts = [module.layout for _, module in _packed(model)]
        whole = layouts and all(layout.of_gpt_oss for layout in layouts) and not _others(model)
        self.quantization_config.written = STORED_METHOD if whole else NAME

    def _process_model_after_weight_loading(self, model: Any, **given: Any) -> Any:
        for _, module in _packed(model):
            module.settle()
        return model

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Expert-parallel rules also hold for blocks and scales. Tensor-parallel ones of the experts go: a matrix in
        MXFP4 is not cut, so without `ep_size` every rank has all experts."""
        super().update_parallel_plan(model, plan)
        experts = [_wildcard(name) for name, _ in _packed(model)]
        for name in experts:
            for rule in [rule for rule in plan if rule == name or rule.startswith(f"{name}.")]:
                parameter = rule.removeprefix(f"{name}.")
                absent = parameter in PROJECTIONS and self.pre_quantized
                if plan is model.tp_plan or absent:
                    del plan[rule]

    def param_needs_quantization(self, model: Any, param_name: str, **given: Any) -> bool:
        """Whether it is a matrix of experts that the checkpoint stores in another format."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, PackedExperts) and name in PROJECTIONS

    def get_quantize_ops(self) -> Quantize:
        """What the loader does with such a matrix."""
        return Quantize()

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """These experts have no gradients."""
        return False


def replace_with_epmoe_experts(model: nn.Module, config: EpmoeConfig, *, stored: bool = False) -> int:
    """Put a `PackedExperts` in the place of every experts module that fits; says on standard error if none does.

    Those on the meta device wait for the loader. Experts that have values are quantised, one matrix after the other,
    and their own go; then the model knows its quantiser, so that it is saved as any other.

    Args:
        model: any; changed in place.
        config: what to leave out, and the backend.
        stored: the checkpoint to come has blocks and scales.

    Returns:
        how many were replaced.

    Raises:
        UserError: experts that the checkpoint stores in MXFP4 shall stay as they were; or weights that are loaded are
            spread over ranks already.
    """
    found, unfit, kept, taken = 0, "", config.modules_to_not_convert, False
    for name, module in list(model.named_modules()):
        if not all(getattr(getattr(module, each, None), "ndim", 0) == 3 for each in PROJECTIONS):
            continue
        if not should_convert_module(name, kept):
            theirs = [each for each in kept or [] if each not in config.asked]
            if stored and should_convert_module(name, theirs):
                raise UserError(
                    f"EpmoeConfig: modules_to_not_convert={config.asked} keeps {name}, which this checkpoint stores in "
                    "MXFP4: leave it out"
                )
            continue
        try:
            packed = PackedExperts(module, layout_of(module), config.experts, stored=stored)
        except UnfitError as error:
            unfit = f"; {name} ({type(module).__name__}) {error}"
            continue
        if not any(parameter.is_meta for parameter in module.parameters()):
            packed.take(module)
            taken = True
        model.set_submodule(name, packed)
        found += 1
    if not found:
        warn(
            f"EpmoeConfig: no experts to convert in {type(model).__name__}: looked for modules with "
            f"{' and '.join(PROJECTIONS)} of three dimensions and a SwiGLU gate, outside "
            f"modules_to_not_convert={kept}{unfit}: the model stays as it is"
        )
    if taken and isinstance(model, PreTrainedModel):
        model.hf_quantizer = EpmoeQuantizer(config, pre_quantized=False)
        model.hf_quantizer.know(model)
        model.hf_quantizer.postprocess_model(model)
    return found


def _packed(model: nn.Module) -> list[tuple[str, PackedExperts]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PackedExperts)]


def _others(model: nn.Module) -> bool:
    """Whether some experts of the model stay in the format that they had."""
    return any(hasattr(module, PROJECTIONS[0]) and not isinstance(module, PackedExperts) for module in model.modules())


def _wildcard(name: str) -> str:
    """A module's name as plans have it: the layer's number is a star."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _takes_stored(merge: Any) -> Any:
    """transformers' rule for a checkpoint that names its quantiser, and one more: MXFP4 is EpmoeConfig's too.

    transformers takes only the configuration class that a checkpoint's quant_method stands for. Without this, nobody
    could ask for another way to run the same MXFP4 weights.
    """

    def merged(stored: Any, asked: Any) -> Any:
        if not isinstance(asked, EpmoeConfig):
            return merge(stored, asked)
        values = stored if isinstance(stored, dict) else stored.to_dict()
        method = str(getattr(values["quant_method"], "value", values["quant_method"]))
        if method in (NAME, STORED_METHOD):
            theirs, asked_too = values.get("modules_to_not_convert") or [], asked.modules_to_not_convert or []
            config = EpmoeConfig([*theirs, *asked_too] or None, asked.experts)
            config.written, config.asked = method, [each for each in asked_too if each not in theirs]
            return config
        raise UserError(
            f"EpmoeConfig: the checkpoint is quantised as {method}, and this reads {STORED_METHOD}, {NAME} or plain "
            "weights: load it without quantization_config"
        )

    return merged


AutoHfQuantizer.merge_quantization_configs = staticmethod(_takes_stored(AutoHfQuantizer.merge_quantization_configs))
