"""Keys of a LazyConfig that nothing reads: found by recording the reads, not by a list of known keys."""

from omegaconf import DictConfig, OmegaConf

_CALLED = ("model", "dataloader", "optimizer", "lr_multiplier", "repr")  # their callables refuse what they do not take
_RESOLVER = "repr_det.read"


class Reads:
    """Records which values of ``train``, and of other nodes that are not called, are read from a config.

    Args:
        cfg: changed in place: each of these values becomes an interpolation that gives it and notes its key.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._values: list[tuple[str, object]] = []
        self._seen: set[str] = set()
        OmegaConf.register_new_resolver(_RESOLVER, self._read, replace=True, use_cache=False)
        for name in cfg:
            if name not in _CALLED and isinstance(cfg[name], DictConfig):
                self._record(cfg[name], str(name))

    def unread(self) -> list[str]:
        """The keys that were not read, such as train.clip_grad for all that lies below it."""
        used = {_short(key) for key in self._seen}
        return sorted({_short(key) for key, _ in self._values} - used)

    def _record(self, node: DictConfig, path: str) -> None:
        for key in list(node):
            value = node[key]
            if isinstance(value, DictConfig):
                self._record(value, f"{path}.{key}")
                continue
            self._values.append((f"{path}.{key}", value))
            node[key] = f"${{{_RESOLVER}:{len(self._values) - 1}}}"

    def _read(self, number: int) -> object:
        key, value = self._values[number]
        self._seen.add(key)
        return value


def _short(key: str) -> str:
    return ".".join(key.split(".")[:2])
