"""What is asked of a Trainer, with any data module, with none, and without a trainer."""

import lightning as L

from lightning_itk.trainer import Replica, datamodule, log_folder, replica


class Data(L.LightningDataModule):
    batch_size = 3
    max_token_id = 7


def test_a_data_module_answers_what_it_knows(tmp_path):
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    assert datamodule(trainer).max_token_id == -1
    assert datamodule(trainer).teachers == ()
    trainer.datamodule = Data()
    asked = datamodule(trainer)
    assert (asked.batch_size, asked.max_token_id, asked.packing, asked.scoring_dataloader) == (3, 7, False, None)
    assert log_folder(trainer) == tmp_path


def test_one_process_is_the_only_replica():
    assert replica(None) == replica(L.Trainer(accelerator="cpu", logger=False)) == Replica(0, 1)
