"""Types and ranges of the NeMo training entries that are translated, by dotted name."""

import math
from typing import Any, NamedTuple

from ..utils.arguments import bad_argument


class Entry(NamedTuple):
    """Allowed values of an entry: a type, and for numbers a closed range."""

    type: type
    lowest: float = -math.inf
    highest: float = math.inf
    is_list: bool = False
    words: str = ""  # description, if more than the type

    def read(self, name: str, value: Any) -> Any:
        """Check and return the value, converted if YAML parses another type, such as text for `1e-8`."""
        if self.is_list:
            if not isinstance(value, list):
                self.refuse(name, value)
            return [self._replace(is_list=False).read(name, entry) for entry in value]
        if self.type is object:
            return value
        if not isinstance(value, TYPES[self.type]) or isinstance(value, bool) != (self.type is bool):
            self.refuse(name, value)
        try:
            converted = self.type(value)
        except (ValueError, OverflowError):
            self.refuse(name, value)
        if self.type is int and not isinstance(value, str) and converted != value:
            self.refuse(name, value)
        if self.type is str and (not converted.strip() or "${" in converted):
            self.refuse(name, value)
        if self.type in (int, float) and not self.lowest <= converted <= self.highest:
            self.refuse(name, value)
        return converted

    def refuse(self, name: str, value: Any) -> None:
        raise bad_argument(name, value, self.describe())

    def describe(self) -> str:
        """Describe the allowed values, for messages."""
        if self.words:
            return self.words
        words = "of type list, of " if self.is_list else "of type "
        words += "number or list" if self.type is object else self.type.__name__
        if self.type is str:
            words += ", not empty and without references"
        return words + (f" from {self.lowest:g} to {self.highest:g}" if self.lowest > -math.inf else "")


TYPES = {int: (int, float, str), float: (int, float, str), str: (str, int), bool: (bool,)}
MANY = 10**9
BELOW_ONE = math.nextafter(1, 0)
SWITCH, TEXT, ANY = Entry(bool), Entry(str), Entry(object)
COUNT, COUNT_OR_NONE, BATCH = Entry(int, 1, MANY), Entry(int, 0, MANY), Entry(int, 1, 2**20)
RESOLUTION = Entry(int, 1, 2**14)  # pixels

ENTRIES = {
    "allow_tf32": SWITCH,
    "trainer.max_steps": COUNT._replace(words="a number of steps, from 1 to 1e9"),
    "trainer.gradient_clip_val": Entry(float, 0, 1e6),
    "trainer.log_every_n_steps": COUNT,
    "trainer.precision": TEXT,
    "trainer.devices": ANY,
    "trainer.num_nodes": COUNT,
    "trainer.accumulate_grad_batches": COUNT,
    "exp_manager.exp_dir": TEXT,
    "exp_manager.checkpoint_callback_params.every_n_train_steps": COUNT,
    "exp_manager.create_wandb_logger": SWITCH,
    "exp_manager.create_tensorboard_logger": SWITCH,
    "exp_manager.ema.enable": SWITCH,
    "exp_manager.ema.decay": Entry(float, 0, BELOW_ONE),
    "exp_manager.ema.every_n_steps": COUNT,
    "model.seed": Entry(int, 0, 2**32 - 1),
    "model.inductor": SWITCH,
    "model.channels_last": SWITCH,
    "model.precision": TEXT,
    "model.micro_batch_size": BATCH,
    "model.global_batch_size": BATCH,
    "model.unet_type": TEXT,
    "model.unet.gradient_checkpointing": SWITCH,
    "model.noise_cond_aug": SWITCH,
    "model.preconditioning_type": TEXT,
    "model.preconditioning.loss_type": TEXT,
    "model.preconditioning.pred_objective": TEXT,
    "model.preconditioning.noise_schedule": TEXT,
    "model.preconditioning.sigma_data": Entry(float, 1e-4, 1000),
    "model.preconditioning.p_mean": Entry(float, -20, 20),
    "model.preconditioning.p_std": Entry(float, 1e-4, 20),
    "model.conditioning.token_length": BATCH,
    "model.conditioning.drop_rate": Entry(float, 0, 1),
    "model.data.num_workers": Entry(int, 0, 1024),
    "model.data.synthetic_data": SWITCH,
    "model.data.train.augmentations.resize_smallest_side": RESOLUTION,
    "model.data.train.augmentations.center_crop_h_w": ANY,
    "model.data.train.augmentations.horizontal_flip": SWITCH,
    "model.data.train.filterings.resolution.method": TEXT,
    "model.data.train.filterings.resolution.value": RESOLUTION,
    "model.data.train.target_resolutions": RESOLUTION._replace(is_list=True),
    "model.data.train.corruption_aug.target_resolution": RESOLUTION._replace(is_list=True),
    "model.optim.name": TEXT,
    "model.optim.lr": Entry(float, 0, 1),
    "model.optim.betas": Entry(float, 0, BELOW_ONE, is_list=True),
    "model.optim.weight_decay": Entry(float, 0, 100),
    "model.optim.eps": Entry(float, 1e-30, 1),
    "model.optim.sched.name": TEXT,
    "model.optim.sched.warmup_steps": COUNT_OR_NONE,
    "model.optim.sched.warmup_ratio": Entry(float, 0, 1),
    "model.optim.sched.min_lr": Entry(float, 0, 1),
    "model.optim.sched.constant_steps": COUNT_OR_NONE,
}
# sections that contain entries
SECTIONS = {name.rsplit(".", depth)[0] for name in ENTRIES for depth in range(1, name.count(".") + 1)}
