"""The stages of a network: the ends of a U-Net's blocks and a transformer's blocks, by their module paths."""

import re
from typing import Final

STAGE: Final = re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+|transformer_blocks\.\d+|blocks\.\d+)")
