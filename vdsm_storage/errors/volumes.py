# SPDX-License-Identifier: GPL-2.0-or-later
"""Of volumes and images, and of their transfer."""

from __future__ import annotations

from vdsm_storage.errors.general import AgentError

# -- volumes and images -----------------------------------------------------------------------


class InvalidParameter(AgentError):
    code = 1000
    template = "{parameter}: {reason} (it is {value})"


class VolumeDoesNotExist(AgentError):
    code = 201
    template = "No volume {volume} in image {image} of domain {domain}"


class IncorrectFormat(AgentError):
    code = 202
    template = "Volume {volume}: {reason}"


class VolumeIsBusy(AgentError):
    code = 203
    template = "Volume {volume} is in use ({reason}); try again when it is free"


class VolumeImageHasChildren(AgentError):
    code = 204
    template = "Volume {volume} has children ({children}); delete those first"


class VolumeCreationError(AgentError):
    code = 205
    template = "Volume {volume} could not be created: {reason}"


class VolumeExtendingError(AgentError):
    code = 206
    template = "Volume {volume} could not be extended to {size} bytes: {reason}"


class VolumeMetadataReadError(AgentError):
    code = 207
    template = "The metadata of volume {volume} cannot be used: {reason}"


class VolumeMetadataWriteError(AgentError):
    code = 208
    template = "The metadata of volume {volume} cannot be written: {reason}"


class VolumeAccessError(AgentError):
    code = 209
    template = "{path} cannot be used: {reason}"


class VolumeAlreadyExists(AgentError):
    code = 212
    template = "Volume {volume} exists already in image {image} of domain {domain}"


class VolumeNonWritable(AgentError):
    code = 213
    template = "Volume {volume} must not be changed: it is {role}"


class VolumeNonShareable(AgentError):
    code = 214
    template = "Volume {volume} is {role}; another image can be based on a template (SHARED) only"


class CannotShareVolume(AgentError):
    code = 218
    template = "Volume {volume} cannot become part of image {image}: {reason}"


class CannotDeleteSharedVolume(AgentError):
    code = 223
    template = "Volume {volume} is a template that images {images} use; delete those first"


class IllegalVolumeSnapshot(AgentError):
    code = 226
    template = "Volume {volume} is ILLEGAL and cannot be the base of another volume"


class PrepareIllegalVolume(AgentError):
    code = 227
    template = "Volume {volume} is ILLEGAL; use allowIllegal to prepare it all the same"


class CreateVolumeSizeError(AgentError):
    code = 229
    template = "Volume {volume}: a capacity of {size} bytes cannot be given to a volume"


class VolumeResizeValueError(AgentError):
    code = 232
    template = "Volume {volume} has {current} bytes; {size} would shrink it"


class ImagePathError(AgentError):
    code = 254
    template = "{path} is no image: {reason}"


class ImageIsNotLegalChain(AgentError):
    code = 262
    template = "The volumes of image {image} are no legal chain: {reason}"


class TemplateNotOnTarget(AgentError):
    code = 263
    template = "Image {image} is based on template {volume}; copy that to domain {domain} first"


class OverwriteImageError(AgentError):
    code = 265
    template = "Image {image} exists already in domain {domain}; delete it there first"


class ImageDoesNotExistInSD(AgentError):
    code = 268
    template = "No image {image} in domain {domain}"


class NoSpaceLeftOnDomain(AgentError):
    code = 397
    template = "Domain {domain} has no space for {size} bytes"


class TooManyVolumes(AgentError):
    code = 397
    template = (
        "Domain {domain} has {limit} volumes, as many as it has leases for: delete volumes or use"
        " another domain"
    )


class MetadataOverflow(AgentError):
    code = 756
    template = (
        "The metadata of volume {volume} has {size} bytes, {limit} fit; shorten its description"
    )


class MetadataCleared(AgentError):
    code = 757
    template = "The metadata of volume {volume} was cleared: it is partly deleted, delete it again"


# -- jobs on the data of volumes --------------------------------------------------------------


class DestinationVolumeTooSmall(AgentError):
    code = 79
    template = "Volume {volume} has {size} bytes, the source {needed}; extend it first"


class InvalidVolumeUpdate(AgentError):
    code = 235
    template = "Volume {volume} cannot be updated: {reason}"


class MergeSnapshotsError(AgentError):
    code = 252
    template = "Volume {top} could not be merged into {base}: {reason}"


class CopyImageError(AgentError):
    code = 261
    template = "The copy to volume {volume} failed: {reason}"


class ImageVerificationError(AgentError):
    code = 484
    template = "Volume {volume} must not be used: {reason}"


class GenerationMismatch(AgentError):
    code = 911
    template = (
        "Volume {volume} has generation {actual}, the request says {requested}: "
        "the job ran already, or was fenced"
    )


class VolumeIsNotInChain(AgentError):
    code = 920
    template = "Volume {volume} is not in the chain of image {image}: {chain}"


class WrongParentVolume(AgentError):
    code = 921
    template = "The parent of volume {top} is {parent}, not {base}"


class UnexpectedVolumeState(AgentError):
    code = 922
    template = "Volume {volume} is {actual}; this step needs {expected}"


class BitmapDoesNotExist(AgentError):
    code = 947
    template = "Volume {volume} has no bitmap {bitmap}"


class AddBitmapError(AgentError):
    code = 1620
    template = "Bitmap {bitmap} could not be added to volume {volume}: {reason}"


class MergeBitmapError(AgentError):
    code = 1621
    template = "Bitmap {bitmap} of volume {top} could not be merged into {base}: {reason}"


class RemoveBitmapError(AgentError):
    code = 1622
    template = "Bitmap {bitmap} could not be removed from volume {volume}: {reason}"


class UnsupportedOperation(AgentError):
    code = 2009
    template = "{operation} is not possible here: {reason}"


# -- image transfers --------------------------------------------------------------------------


class StreamFailed(AgentError):
    code = 250
    template = "The image stream of task {task} failed: {reason}"


class StreamTooLong(AgentError):
    code = 229
    template = "{length} bytes do not fit into volume {volume} of {capacity} bytes"


class ImageTicketsError(AgentError):
    code = 481
    template = "ovirt-imageio refused to {method} ticket {ticket}: {status} {reason}"


class ImageDaemonError(AgentError):
    code = 482
    template = "ovirt-imageio does not answer at {path} ({reason}); look at the service's log"


class ImageDaemonUnsupported(AgentError):
    code = 483
    template = "ovirt-imageio does not run on this host (no {path}); install and start it"
