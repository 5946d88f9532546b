#!/bin/sh
# Own pictures: a folder whose sub-folders are the classes. Usage: sh examples/own_images.sh ~/pictures
# For pictures without classes add data.labels=false. The batch of 256 is shared by the experts.
ddm run data=image_folder data.path="$1" data.image_size=32 codec=pca_conv codec.components=64 \
    partition.num_experts=4 expert=residual_mlp_large expert.training.steps=1500 expert.training.batch_size=256 \
    scores.num_samples=512 name=own_images
ddm sample runs/own_images --seeds 0-15 --out own_images.png
