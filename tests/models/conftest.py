import pytest
from networks import NETWORKS, make


@pytest.fixture(params=NETWORKS)
def unet(request):
    return make(request.param)


@pytest.fixture(params=["unet-fused", "efficient-cross"])
def one_of_each_class(request):
    return make(request.param)
