"""The community's kernels: which package of the Hub, from where, and whether it has what is called here.

    hub.kernel=owner/name@v1         version 1 of a repository of the Hub, downloaded once (the default is such a one)
    hub.kernel=owner/name@COMMIT     40 hexadecimal digits: this code and no other
    hub.kernel=DIRECTORY             a repository that lies here, as `build/torch-cuda/…` or that folder itself
    LOCAL_KERNELS=owner/name=DIR     of the environment: such a directory in the place of the Hub's repository

The package `kernels` finds the build that fits torch and the device, downloads and imports it. It runs code of its
publisher: a version is taken from publishers that the Hub trusts, a commit from whoever was named.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from epmoe.errors import UserError, first_line

# What is called, by the package's modules.
NAMES = {
    "matmul_ogs": ("matmul_ogs", "FnSpecs", "FusedActivation", "PrecisionConfig", "FlexCtx", "InFlexData"),
    "routing": ("RoutingData", "GatherIndx", "ScatterIndx", "compute_expt_data"),
    "swiglu": ("swiglu_fn",),
    "tensor": ("wrap_torch_tensor", "convert_layout", "FP4"),
    "tensor_details": ("layout",),
}
REMEDY = "give hub.kernel=DIRECTORY that holds it, or LOCAL_KERNELS=owner/name=DIRECTORY, or choose other experts="
_PINNED = re.compile(r"([\w.-]+/[\w.-]+)@(?:v(\d{1,6})|([0-9a-f]{40}))")


@cache
def kernel_package(kernel: str) -> Any:
    """The module that `hub.kernel` names, imported; downloaded first, where it has to be.

    Raises:
        UserError: neither a directory nor a pinned name, no package `kernels`, no network, no build for this machine,
            or one that lacks what is called.
    """
    module = _imported(kernel)
    lacking = [
        f"{part}.{name}"
        for part, names in NAMES.items()
        for name in names
        if not hasattr(getattr(module, part, None), name)
    ]
    if lacking:
        raise UserError(
            f"hub.kernel={kernel} is no gpt-oss-triton-kernels, it lacks {', '.join(lacking[:3])}: {REMEDY}"
        )
    return module


def _imported(kernel: str) -> Any:
    folder, pinned = Path(kernel).expanduser(), _PINNED.fullmatch(kernel)
    if pinned is None and not (kernel and folder.is_dir()):
        raise UserError(
            f"hub.kernel={kernel} is neither a directory nor a pinned name: give a directory, owner/name@v1, or "
            "owner/name@COMMIT with its 40 digits"
        )
    try:
        import kernels
    except ImportError as error:
        raise UserError(
            f"experts=hub needs the package kernels ({error}): pip install kernels, or choose other experts="
        ) from error
    try:
        if pinned is None:
            return kernels.get_local_kernel(folder.resolve())
        name, version, commit = pinned.groups()
        if version is not None:
            return kernels.get_kernel(name, version=int(version))
        return kernels.get_kernel(name, revision=commit, trust_remote_code=[name])
    except Exception as error:  # the network's, the Hub's, the package's, and what importing the kernels' code raises
        raise UserError(f"hub.kernel={kernel} cannot be loaded ({first_line(error)}): {REMEDY}") from error
