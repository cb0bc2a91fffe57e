"""A world made by code: two domains of questions with one right answer each, and models small enough for a CPU."""

from lightning_itk.toy.questions import CATALOGUE, DOMAINS, Domain, Question, Split, make_questions
from lightning_itk.toy.world import (
    CHAT_TEMPLATE,
    World,
    make_model,
    make_records,
    make_student,
    make_teacher,
    make_tokenizer,
    write_world,
)
