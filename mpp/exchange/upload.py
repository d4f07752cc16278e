"""An export to a Hugging Face hub: verified first, then sent as it is, by huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from mpp.errors import UserError, one_line
from mpp.exchange.convert import verify


def upload(folder: str | Path, repository: str, *, public: bool = False) -> str:
    """Send an export to a Hugging Face hub.

    The hub and the token are huggingface_hub's: HF_ENDPOINT, HF_TOKEN or `hf auth login`.

    Args:
        folder: The export, which is verified first.
        repository: OWNER/NAME, which is made where it is not there.
        public: Whether it is public where it is made.

    Returns:
        Its address.

    Raises:
        UserError: The export does not hold, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    path = Path(folder)
    if not (path / "export.json").is_file():
        raise UserError(f"{path}: not an export; make one by `mpp export` first")
    verify(path)
    api = HfApi()
    try:
        made = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=path, commit_message="Upload an encoder")
    except UnicodeEncodeError as error:  # of a header, before anything is sent
        raise UserError(f"{repository}: HF_TOKEN: holds characters that no token has") from error
    except HFValidationError as error:
        raise UserError(f"{repository}: {one_line(error)}") from error
    except Exception as error:  # of the hub, the network or the token, each in its own class
        raise UserError(f"{repository}: cannot be sent to {api.endpoint}: {one_line(error)}") from error
    return str(made)
