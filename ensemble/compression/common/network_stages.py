"""Module paths of a network's stages, at whose ends features are compared: the blocks of U-Nets and transformers."""

import re
from typing import Final

STAGE: Final = re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+|transformer_blocks\.\d+|blocks\.\d+)")
