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
        self._used: set[str] = set()
        OmegaConf.register_new_resolver(_RESOLVER, self._read, replace=True, use_cache=False)
        for name in cfg:
            if name not in _CALLED and isinstance(cfg[name], DictConfig):
                for key in list(cfg[name]):
                    self._record(cfg[name], key, f"{name}.{key}")

    def unread(self) -> list[str]:
        """The keys that were not read, such as train.clip_grad for all that lies below it."""
        return sorted({name for name, _ in self._values} - self._used)

    def _record(self, node: DictConfig, key: str, name: str) -> None:
        if isinstance(node[key], DictConfig):
            for below in list(node[key]):
                self._record(node[key], below, name)
            return
        self._values.append((name, node[key]))
        node[key] = f"${{{_RESOLVER}:{len(self._values) - 1}}}"

    def _read(self, number: int) -> object:
        name, value = self._values[number]
        self._used.add(name)
        return value
