"""Principal components as the encoder of the miniature latent diffusion model, smooth colours as its first decoder.

The components of 8 x 8 pixels need no training, and keep more of a scene than an encoder that has been trained for the
time that a miniature allows. They are taken level by level, as the encoder halves the side: those of 2 x 2 pixels,
those of 2 x 2 of their values, and once more. The weights of the encoder are set so that it computes them: its residual
branches are zero, its strided convolutions hold the components, and the last normalisation, which would divide by the
picture's own contrast, divides by a constant, because constant channels far larger than the others decide its result.

The decoder is set in the same way to the mean colours of the cells, smoothed at each doubling of the side; its residual
branches then learn what is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_CONSTANT = 40.0
"""Value of the constant channels; those of the signal have a standard deviation of about 1."""
_SLOPE, _OFFSET = 3.0, 4.0
"""Scale and bias of the last normalisation: its results lie where the activation after it is nearly linear."""
_LOG_VARIANCE = -7.0
"""Of the latents' distribution, which is narrow: 3 % of their standard deviation."""


@torch.no_grad()
def fit_encoder(model: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Set the encoder's weights so that its latents are principal components.

    Their variances are equalised halfway (each is divided by the square root of its deviation), so that fine structure
    is neither lost nor as loud as colour; the mean variance is 1.

    Args:
        model: an autoencoder of one residual block a level and no attention.
        pixels: `[N, 3, H, W]` float32 in [-1, 1], `H` and `W` multiples of 8.
    """
    encoder = model.encoder
    _silence_residuals(encoder)
    colours = pixels.shape[1]
    _set_matrix(encoder.conv_in, torch.eye(colours))
    values = pixels
    last = len(encoder.down_blocks) - 1
    for number, block in enumerate(encoder.down_blocks):
        resnet = block.resnets[0]
        if resnet.conv_shortcut is not None:
            _set_matrix(resnet.conv_shortcut, torch.eye(values.shape[1]))
        if number < last:
            convolution = block.downsamplers[0].conv
            # The level after the next one has more channels; what this one keeps has to fit into its own.
            components = _components(_unfold(values), min(convolution.out_channels, 4 * values.shape[1]))
            values = torch.einsum("ndhw,kd->nkhw", _unfold(values), components)
            _set_quarters(convolution, components)
    _finish(model, values)


@torch.no_grad()
def fit_decoder(model: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Set the decoder's weights so that it paints each cell's mean colour, smoothly.

    Args:
        model: an autoencoder whose encoder `fit_encoder` has set.
        pixels: `[N, 3, H, W]` float32 in [-1, 1], `H` and `W` multiples of 8.
    """
    decoder, latent_channels = model.decoder, model.config.latent_channels
    _silence_residuals(decoder)
    latents = model.encode(pixels).latent_dist.mode()
    colours = F.adaptive_avg_pool2d(pixels, latents.shape[2:])
    rows, targets = (x.transpose(0, 1).flatten(1).T for x in (latents, colours))
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    solution = torch.linalg.lstsq(rows, targets).solution
    # The first channels carry the colours, the next three their negatives, so that the mean that the last normalisation
    # takes away stays 0; then come the latents, for what the residual branches will learn.
    matrix = torch.cat([solution[:-1].T, -solution[:-1].T, torch.eye(latent_channels)])
    _set_matrix(model.post_quant_conv, torch.eye(latent_channels))
    _set_matrix(decoder.conv_in, matrix)
    decoder.conv_in.bias[:6] = torch.cat([solution[-1], -solution[-1]])
    smooth = torch.tensor([1.0, 2.0, 1.0]) / 4.0
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                _set_matrix(resnet.conv_shortcut, torch.eye(resnet.conv_shortcut.out_channels))
        for upsampler in block.upsamplers or ():
            width = upsampler.conv.out_channels
            upsampler.conv.bias.zero_()
            upsampler.conv.weight.copy_(torch.eye(width)[:, :, None, None] * torch.outer(smooth, smooth))
    # The two last channels of the last level are the constants of the last normalisation.
    shortcut, width = block.resnets[0].conv_shortcut, decoder.conv_norm_out.num_channels
    shortcut.weight[width - 2 :] = 0.0
    shortcut.bias[width - 2 :] = torch.tensor([_CONSTANT, -_CONSTANT])
    decoder.conv_norm_out.weight.fill_(_SLOPE)
    decoder.conv_norm_out.bias.fill_(_OFFSET)
    # Two colours tell how the activation scales and shifts them.
    probe = torch.zeros(2, width, 2, 2)
    probe[:, width - 2], probe[:, width - 1] = _CONSTANT, -_CONSTANT
    probe[0, :3] = probe[1, 3:6] = -0.5
    probe[1, :3] = probe[0, 3:6] = 0.5
    dark, bright = F.silu(decoder.conv_norm_out(probe))[:, 0, 0, 0]
    _set_matrix(decoder.conv_out, torch.eye(3) / (bright - dark))
    decoder.conv_out.bias.fill_(0.5 - float(bright / (bright - dark)))


def _silence_residuals(half: nn.Module) -> None:
    """Make every residual block of an encoder or decoder its shortcut alone."""
    for name, module in half.named_modules():
        if name.endswith("conv2") and isinstance(module, nn.Conv2d):
            _clear(module)


def _clear(convolution: nn.Conv2d) -> None:
    """Set the weights and biases of a convolution to 0."""
    convolution.weight.zero_()
    if convolution.bias is not None:
        convolution.bias.zero_()


def _unfold(values: torch.Tensor) -> torch.Tensor:
    """Return the 2 x 2 blocks of `[N, C, H, W]` as channels, `[N, 4 C, H / 2, W / 2]`: `C` of each place in turn."""
    places = [values[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return torch.cat(places, dim=1)


def _components(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return the strongest `count` principal directions of `[N, D, H, W]`, `[count, D]` orthonormal rows."""
    rows = values.transpose(0, 1).flatten(1).double()
    _, directions = torch.linalg.eigh(rows.cov())
    return directions.flip(1)[:, :count].T.float()


def _set_matrix(convolution: nn.Conv2d, matrix: torch.Tensor) -> None:
    """Make a convolution the matrix `[K, D]` on the first `D` channels of each pixel; the other results are 0."""
    _clear(convolution)
    middle = convolution.kernel_size[0] // 2
    rows, columns = matrix.shape
    convolution.weight[:rows, :columns, middle, middle] = matrix


def _set_quarters(convolution: nn.Conv2d, matrix: torch.Tensor) -> None:
    """Make a strided convolution the matrix `[K, 4 C]` on the blocks of `_unfold`; it pads at the right and below."""
    _clear(convolution)
    rows, channels = len(matrix), matrix.shape[1] // 4
    for place in range(4):
        part = matrix[:, place * channels : (place + 1) * channels]
        convolution.weight[:rows, :channels, place // 2, place % 2] = part


def _finish(model: AutoencoderKL, values: torch.Tensor) -> None:
    """Set what follows the levels: constants for the normalisation, then the latents and their narrow distribution."""
    encoder, latents = model.encoder, model.config.latent_channels
    signal, width = values.shape[1], encoder.conv_norm_out.num_channels
    shortcut = encoder.down_blocks[-1].resnets[0].conv_shortcut
    half = (width - signal) // 2
    shortcut.bias[signal : signal + half] = _CONSTANT
    shortcut.bias[signal + half : signal + 2 * half] = -_CONSTANT
    encoder.conv_norm_out.weight.fill_(_SLOPE)
    encoder.conv_norm_out.bias.fill_(_OFFSET)
    # How the activation changes the signal's scale is measured: the components of what comes out of it are the latents.
    constants = shortcut.bias[None, signal:, None, None].expand(len(values), -1, *values.shape[2:])
    activated = F.silu(encoder.conv_norm_out(torch.cat([values, constants], dim=1)))[:, :signal]
    components = _components(activated, latents)
    projected = torch.einsum("ndhw,kd->nkhw", activated, components)
    means, deviations = projected.mean(dim=(0, 2, 3)), projected.std(dim=(0, 2, 3))
    scale = deviations.rsqrt() / deviations.mean().sqrt()
    _set_matrix(encoder.conv_out, scale[:, None] * components)
    encoder.conv_out.bias[:latents] = -scale * means
    encoder.conv_out.bias[latents:] = _LOG_VARIANCE
    _set_matrix(model.quant_conv, torch.eye(2 * latents))
