"""Verify an export and upload it unchanged to a Hugging Face hub with huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from mpp.errors import UserError, one_line
from mpp.exchange.convert import verify


def upload(folder: str | Path, repository: str, *, public: bool = False) -> str:
    """Verify an export and upload it to a Hugging Face hub.

    huggingface_hub finds the hub and the token: HF_ENDPOINT, HF_TOKEN or `hf auth login`.

    Args:
        folder: The export.
        repository: Name of the repository, OWNER/NAME. It is created if it does not exist.
        public: Whether a new repository is public.

    Returns:
        The address of the repository.

    Raises:
        UserError: If verification fails, or if the hub refuses the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    path = Path(folder)
    if not (path / "export.json").is_file():
        raise UserError(f"{path}: not an export; run `mpp export` first")
    verify(path)
    api = HfApi()
    try:
        made = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=path, commit_message="Upload an encoder")
    except UnicodeEncodeError as error:  # the token does not fit into a header; nothing has been sent
        raise UserError(f"{repository}: HF_TOKEN: contains invalid characters") from error
    except HFValidationError as error:
        raise UserError(f"{repository}: {one_line(error)}") from error
    except Exception as error:  # errors of the hub, the network and the token have many classes
        raise UserError(f"{repository}: cannot be sent to {api.endpoint}: {one_line(error)}") from error
    return str(made)
