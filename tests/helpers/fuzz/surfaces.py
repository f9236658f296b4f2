"""All that is given inputs of chance, with its share of ten thousand cases."""

from helpers.fuzz import sources, texts, weights
from helpers.fuzz.cases import Surface

SURFACES = (
    Surface("image files", sources.image_case, 2000),
    Surface("folders: captions, metadata", sources.folder_case, 700),
    Surface("tars", sources.tar_case, 700),
    Surface("Parquet files", sources.parquet_case, 500),
    Surface("prepared data sets", sources.dataset_case, 700),
    Surface("recipes", texts.recipe_case, 400),
    Surface("command lines", texts.command_case, 600),
    Surface("values of options", texts.option_case, 500),
    Surface("files of prompts", texts.prompts_case, 700),
    Surface("NAMI-1K's prompts", texts.nami1k_case, 400),
    Surface("DPG-Bench's questions", texts.questions_case, 400),
    Surface("rating files", texts.ratings_case, 500),
    Surface("judge's answers", texts.judge_case, 300),
    Surface("checkpoints", weights.checkpoint_case, 400),
    Surface("checkpoints in shards", weights.shards_case, 200),
    Surface("networks of others", weights.network_case, 200),
    Surface("LoRAs", weights.lora_case, 100),
    Surface("prompts and settings of images", weights.drawing_case, 200),
    Surface("texts on pictures", weights.picture_case, 200),
    Surface("settings in images", weights.image_settings_case, 150),
    Surface("evaluations of runs", weights.metrics_case, 150),
)
