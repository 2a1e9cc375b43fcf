"""The advice for an unknown argument follows its meaning, in camelCase, with other words and in another order."""

from __future__ import annotations

import pytest

from evolink_mcp.tools.argument_names import UNSUPPORTED, correction
from evolink_mcp.tools.compute_size import ComputeSizeArguments
from evolink_mcp.tools.generate_image import GenerateImageArguments
from evolink_mcp.tools.generate_images import GenerateImagesArguments
from evolink_mcp.tools.get_task import GetTaskArguments
from evolink_mcp.tools.list_tasks import ListTasksArguments
from evolink_mcp.tools.view_image import ViewImageArguments

MEANINGS = {
    "n": "numberOfImages n_images num_images numImages imageCount image_count count number quantity variations "
    "numVariations batch_size batchSize samples num_samples numOutputs NumberOfPictures image_number copies N_IMAGES",
    "image_urls": "image_path imagePath input_image inputImages img images referenceImages reference_image init_image "
    "initImageUrl inputFile source_image sourceImage photos picture_url ImageUrls imageURLs",
    "mask_url": "mask maskImage mask_image image_mask inpaint_mask inpaintMaskUrl maskUrl mask-url",
    "save_as": "outputPath savePath output_dir outputDirectory out_file save_to saveLocation path folder target_folder "
    "fileName filename file destination output output_image outputFile",
    "size": "aspect_ratio aspectRatio ratio width height imageSize image_size dimensions sizes siez imageWidth",
    "background": "transparent isTransparent transparency alpha transparentBackground",
    "callback_url": "webhook webhookUrl callback callbackUrl",
    "wait_seconds": "timeout timeoutSeconds wait waitSeconds",
    "max_credits": "budget maxCost max_price maxCredits",
    "output_format": "format imageFormat fileFormat image_format outputFormat",
    "prompt": "text description text_prompt instructions promt prmopt",
    "quality": "qualty qualitty",
    "force_new": "force forceNew force_regenerate",
    "resolution": "resolutions resoluton",
}
GENERATE = list(GenerateImageArguments.model_fields)


@pytest.mark.parametrize(
    ("name", "meaning"), [(name, own) for own, names in MEANINGS.items() for name in names.split()]
)
def test_the_refusal_of_an_argument_of_another_service_names_ours(name: str, meaning: str) -> None:
    assert correction(name, GENERATE) == f"did you mean {meaning}?"


@pytest.mark.parametrize(
    "name", "negativePrompt negative_prompt negative style stylePreset style_name systemPrompt".split()
)
def test_an_argument_that_describes_the_picture_is_refused_with_a_hint_to_the_prompt(name: str) -> None:
    assert correction(name, GENERATE) == "write it into the prompt"


@pytest.mark.parametrize("name", [*sorted(UNSUPPORTED), "Seed", "guidanceScale", "cfgScale", "numInferenceSteps"])
def test_an_ability_that_the_model_lacks_is_named(name: str) -> None:
    assert correction(name, GENERATE).startswith("gpt-image-2 has no ")


@pytest.mark.parametrize(
    "name",
    "random_string foo metadata extra prompt_strength_x9 safety x mode modes modal promote equality revolution".split(),
)
def test_a_name_without_a_meaning_is_left_out(name: str) -> None:
    assert correction(name, GENERATE) == "leave it out"


def test_several_prompts_need_several_calls_or_generate_images() -> None:
    assert correction("prompts", GENERATE).startswith("one prompt per call")


@pytest.mark.parametrize("name", ["num_images", "imageCount", "n"])
def test_a_series_has_no_count(name: str) -> None:
    assert correction(name, list(GenerateImagesArguments.model_fields)) == "leave it out"


@pytest.mark.parametrize(
    ("tool", "name", "meaning"),
    [
        (ViewImageArguments, "id", "task_id"),
        (ViewImageArguments, "taskId", "task_id"),
        (ViewImageArguments, "image_index", "index"),
        (ViewImageArguments, "number", "index"),
        (ListTasksArguments, "text", "query"),
        (ListTasksArguments, "count", "limit"),
        (ComputeSizeArguments, "aspectRatio", "size"),
        (ComputeSizeArguments, "numImages", "n"),
        (ListTasksArguments, "limits", "limit"),
        (GetTaskArguments, "path", "task_id"),
        (GetTaskArguments, "jobId", "task_id"),
    ],
)
def test_the_other_tools_get_their_own_argument(tool: type, name: str, meaning: str) -> None:
    assert correction(name, list(tool.model_fields)) == f"did you mean {meaning}?"


@pytest.mark.parametrize("name", ["start", "state", "async", "order"])
def test_a_name_that_only_looks_like_an_argument_of_list_tasks_is_left_out(name: str) -> None:
    assert correction(name, list(ListTasksArguments.model_fields)) == "leave it out"
