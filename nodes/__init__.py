"""The pack's nodes for ComfyUI."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from .attention_map import AttentionMap
from .community_options import FusedIDCommunityOptions
from .cut_picture import CutPicture
from .doctor import FusedIDDoctor
from .face_embed import FaceEmbed
from .face_folder import FaceFolder
from .folders import register_folders
from .fused_attention import FusedIDAttentionPatch
from .hybrid_guidance import HybridGuidance
from .identity_files import LoadIdentity, SaveIdentity
from .instantid_control import FusedIDInstantIDControl
from .load_identity_encoder import LoadIdentityEncoder
from .mix import MixIdentities
from .multi_id_router import MultiIDMaskRouter
from .paste_parts import PasteParts
from .place_in_picture import PlaceInPicture
from .record_attention import RecordAttention
from .similarity import FaceSimilarity


class FusedIDExtension(ComfyExtension):
    """Lists the nodes for the host."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folders()  # before any schema lists what is in them
        return [
            LoadIdentityEncoder,
            FaceEmbed,
            MultiIDMaskRouter,
            FusedIDAttentionPatch,
            FusedIDCommunityOptions,
            FusedIDInstantIDControl,
            RecordAttention,
            AttentionMap,
            CutPicture,
            PlaceInPicture,
            PasteParts,
            HybridGuidance,
            MixIdentities,
            SaveIdentity,
            LoadIdentity,
            FaceSimilarity,
            FaceFolder,
            FusedIDDoctor,
        ]
