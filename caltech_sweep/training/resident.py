"""Images in a GPU's memory, which the trials of a process that see the same ones share."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from caltech_sweep.data.images import LoadedData

_SHARE = 4  # images take at most one part in so many of what is free

_Crops = dict[tuple[torch.device, int, str], torch.Tensor]
_kept: WeakKeyDictionary[LoadedData, _Crops] = WeakKeyDictionary()


def resident_crops(data: LoadedData, part: str, crop: int, device: torch.device) -> torch.Tensor | None:
    """Return the (N, 3, crop, crop) uint8 centre crops of a part in a GPU's memory, or None where they do not fit.

    Those of another size of crop are dropped.
    """
    if device.type != "cuda":
        return None
    crops = _kept.setdefault(data, {})
    if (device, crop, part) not in crops:
        for key in [key for key in crops if key[:2] != (device, crop)]:
            del crops[key]
        if len(data.split.part(part)) * 3 * crop * crop > torch.cuda.mem_get_info(device)[0] // _SHARE:
            return None
        crops[device, crop, part] = data.center_crops(part, crop).to(device)
    return crops[device, crop, part]
