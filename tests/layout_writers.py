"""A rendered capture, written in the layouts that people have: by code that the importers do not share."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from prep.synth.render import render
from prep.synth.scenes import make_orbit, make_scene


@dataclass
class View:
    image: np.ndarray  # RGB
    depth: np.ndarray  # [H, W], 0 where there is nothing
    cam_from_world: np.ndarray  # [3, 4]
    intrinsics: np.ndarray  # [3, 3], (0, 0) the center of the first pixel

    @property
    def world_from_cam(self):
        return np.linalg.inv(np.vstack([self.cam_from_world, [0, 0, 0, 1]]))


def rendered(frames=8, seed=3):
    rng = np.random.default_rng(seed)
    scene = make_scene(rng, "mixed")
    views = []
    for camera in make_orbit(rng, scene.unit, frames):
        image, depth, _ = render(scene, camera)
        pose = camera.cam_from_world.copy()
        pose[:, 3] *= 2 / scene.unit  # in the range of a phone's sensor, whatever the scene's unit
        depth = np.where(np.isfinite(depth), depth * (2 / scene.unit), 0)
        views.append(View(image, depth, pose, camera.intrinsics))
    return views


def write_image(path, rgb, quality=98):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])


def write_depth(path, depth, unit):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.round(depth / unit).clip(0, 65535).astype(np.uint16))


def write_nerfstudio(folder, views):
    frames = []
    for i, view in enumerate(views):
        write_image(folder / "images" / f"im {i:03d}.png", view.image)
        write_depth(folder / "depths" / f"{i:03d}.png", view.depth, 1e-3)
        opengl = view.world_from_cam @ np.diag([1, -1, -1, 1])
        k = view.intrinsics
        camera = {"fl_x": k[0, 0], "fl_y": k[1, 1], "cx": k[0, 2] + 0.5, "cy": k[1, 2] + 0.5}
        size = {"h": view.image.shape[0], "w": view.image.shape[1]}
        names = {"file_path": f"images/im {i:03d}.png", "depth_file_path": f"depths/{i:03d}.png"}
        frames.append(names | camera | size | {"transform_matrix": opengl.tolist()})
    (folder / "transforms.json").write_text(json.dumps({"frames": frames}))


def write_sevenscenes(folder, views):
    for i, view in enumerate(views):
        stem = f"frame-{i:06d}"
        write_image(folder / f"{stem}.color.jpg", view.image)
        depth = np.where(view.depth > 0, view.depth, 65.535)
        write_depth(folder / f"{stem}.depth.png", depth, 1e-3)
        np.savetxt(folder / f"{stem}.pose.txt", view.world_from_cam)
    np.savetxt(folder / "camera-intrinsics.txt", views[0].intrinsics)


def write_tum(folder, views):
    lists = {"rgb": [], "depth": [], "groundtruth": []}
    for i, view in enumerate(views):
        time = 100 + i / 30
        write_image(folder / "rgb" / f"{time:.4f}.jpg", view.image)
        write_depth(folder / "depth" / f"{time + 0.004:.4f}.png", view.depth, 1 / 5000)
        lists["rgb"].append(f"{time:.4f} rgb/{time:.4f}.jpg")
        lists["depth"].append(f"{time + 0.004:.4f} depth/{time + 0.004:.4f}.png")
        pose = view.world_from_cam
        numbers = [*pose[:3, 3], *Rotation.from_matrix(pose[:3, :3]).as_quat()]
        lists["groundtruth"].append(f"{time:.4f} " + " ".join(f"{x:.9f}" for x in numbers))
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(["# of a test", *lines]) + "\n")


def write_scannet(folder, views):
    for name in ("pose", "intrinsic"):
        (folder / name).mkdir(parents=True)
    k = np.eye(4)
    k[:3, :3] = views[0].intrinsics
    np.savetxt(folder / "intrinsic" / "intrinsic_color.txt", k)
    for i, view in enumerate(views):
        write_image(folder / "color" / f"{i}.jpg", view.image)
        write_depth(folder / "depth" / f"{i}.png", view.depth, 1e-3)
        np.savetxt(folder / "pose" / f"{i}.txt", view.world_from_cam)


def write_unified(folder, views):
    import OpenEXR

    (folder / "depths").mkdir(parents=True)
    names = [f"{i:03d}.jpg" for i in range(len(views))]
    for name, view in zip(names, views, strict=True):
        write_image(folder / "images" / name, view.image)
        header = {"type": OpenEXR.scanlineimage, "compression": OpenEXR.ZIP_COMPRESSION}
        OpenEXR.File(header, {"Z": view.depth.astype(np.float32)}).write(str(folder / "depths" / f"{name[:3]}.exr"))
    (folder / "image_names.json").write_text(json.dumps(names))
    np.save(folder / "cam_from_worlds.npy", np.array([view.cam_from_world for view in views]))
    corner = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    np.save(folder / "intrinsics.npy", np.array([view.intrinsics + corner for view in views]))


def write_frames(folder, views):
    (folder / "d").mkdir(parents=True)
    rows = []
    for i, view in enumerate(views):
        write_image(folder / "i" / f"{i:03d}.jpg", view.image)
        np.save(folder / "d" / f"{i:03d}.npy", view.depth.astype(np.float32))
        k = view.intrinsics
        numbers = [*view.cam_from_world.reshape(-1), k[0, 0], k[1, 1], k[0, 2], k[1, 2]]
        rows.append([f"i/{i:03d}.jpg", f"d/{i:03d}.npy", *map(repr, map(float, numbers))])
    header = [
        "image",
        "depth",
        "r11",
        "r12",
        "r13",
        "t1",
        "r21",
        "r22",
        "r23",
        "t2",
        "r31",
        "r32",
        "r33",
        "t3",
        "fx",
        "fy",
        "cx",
        "cy",
    ]
    with (folder / "frames.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


WRITERS = {
    "nerfstudio": write_nerfstudio,
    "sevenscenes": write_sevenscenes,
    "tum": write_tum,
    "scannet": write_scannet,
    "unified": write_unified,
    "frames": write_frames,
}
