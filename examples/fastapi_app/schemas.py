"""What goes in and out."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from mljobs.contrib.pydantic import MlJobRead


class UploadCreate(BaseModel):
    """A file to train on."""

    path: str
    spec: dict[str, float] = Field(default_factory=dict)


class UploadRead(BaseModel):
    """The file and its job."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    path: str
    job: MlJobRead
