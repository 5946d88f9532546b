"""Registry of the network classes by their names. To add one, write its adapter and add a row."""

from experts.networks.adapters.adapter import Adapter
from experts.networks.adapters.class_conditional import dit, residual_mlp, unet
from experts.networks.adapters.cross_attention import pixart, sana, unet_condition
from experts.networks.adapters.joint_attention import (
    auraflow,
    chroma,
    cogview4,
    flux,
    lumina2,
    prx,
    qwen_image,
    sd3,
    z_image,
)

ADAPTERS: dict[str, Adapter] = {
    adapter.class_name: adapter
    for adapter in (
        residual_mlp.ADAPTER,
        unet.ADAPTER,
        dit.ADAPTER,
        unet_condition.ADAPTER,
        pixart.ADAPTER,
        sana.ADAPTER,
        sd3.ADAPTER,
        flux.ADAPTER,
        lumina2.ADAPTER,
        prx.ADAPTER,
        qwen_image.ADAPTER,
        z_image.ADAPTER,
        auraflow.ADAPTER,
        chroma.ADAPTER,
        cogview4.ADAPTER,
    )
}
