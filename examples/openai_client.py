"""Edit one picture with OpenAI's own client (`pip install openai`) and save its previews.

python examples/openai_client.py input.jpg "add a red hat" http://127.0.0.1:8000/v1
"""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI


def main(image_path: str, prompt: str, base_url: str) -> None:
    client = OpenAI(base_url=base_url, api_key=os.environ.get("API_KEY", "none"))
    model = client.models.list().data[0].id
    events = client.images.edit(
        image=Path(image_path),
        prompt=prompt,
        model=model,
        output_format="jpeg",
        stream=True,
        partial_images=2,
        extra_body={"seed": 42, "num_inference_steps": 10, "size_level": 512},
    )
    for event in events:
        if event.type == "image_edit.partial_image":
            print(f"Preview {event.partial_image_index + 1}")
        else:
            output_path = Path(image_path).with_name(f"{Path(image_path).stem}_edited.jpg")
            with output_path.open("xb") as output:  # an earlier result is never replaced
                output.write(base64.b64decode(event.b64_json))
            print(f"Result: {output_path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
