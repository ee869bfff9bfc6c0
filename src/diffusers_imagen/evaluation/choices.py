"""What an evaluation is asked for by name: metrics, and the networks that make features of pictures."""

DISTANCES = ("fid", "kid", "precision-recall")  # from the features of the reference
OF_FEATURES = (*DISTANCES, "is", "nearest")
OF_PAIRS = ("super-resolution",)  # from captions with pictures
METRICS = (*OF_FEATURES, "clip", *OF_PAIRS)

CLIP = "openai/clip-vit-large-patch14"
NAMED = ("inception", "dinov2", "clip", "efficientnet-lite0")
