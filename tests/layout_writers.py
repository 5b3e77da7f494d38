"""A rendered capture, written in the layouts that people have: by code that the importers do not share."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from prep.synth.render import render
from prep.synth.synth import FAMILIES


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
    family = FAMILIES["turntable"]
    scene = family.make_scene(rng, "mixed")
    views = []
    for camera in family.make_cameras(rng, unit=scene.unit, frames=frames):
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


def write_exr(path, depth):
    import OpenEXR

    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"type": OpenEXR.scanlineimage, "compression": OpenEXR.ZIP_COMPRESSION}
    OpenEXR.File(header, {"Z": depth.astype(np.float32)}).write(str(path))


def write_polycam(folder, views):
    for i, view in enumerate(views):
        write_image(folder / "keyframes" / "images" / f"{7000 + i}.jpg", view.image)
        write_depth(folder / "keyframes" / "depth" / f"{7000 + i}.png", view.depth, 1e-3)
        opengl, k = view.world_from_cam @ np.diag([1, -1, -1, 1]), view.intrinsics
        values = {f"t_{row}{column}": opengl[row, column] for row in range(3) for column in range(4)}
        values |= {"fx": k[0, 0], "fy": k[1, 1], "cx": k[0, 2] + 0.5, "cy": k[1, 2] + 0.5, "blur_score": 80.0}
        values |= {"width": view.image.shape[1], "height": view.image.shape[0]}
        path = folder / "keyframes" / "cameras" / f"{7000 + i}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values))


def write_record3d(folder, views):
    import liblzfse

    poses = []
    for i, view in enumerate(views):
        write_image(folder / "rgbd" / f"{i}.jpg", view.image)
        (folder / "rgbd" / f"{i}.depth").write_bytes(liblzfse.compress(view.depth.astype("<f4").tobytes()))
        opengl = view.world_from_cam @ np.diag([1, -1, -1, 1])
        poses.append([*Rotation.from_matrix(opengl[:3, :3]).as_quat(), *opengl[:3, 3]])
    k = views[0].intrinsics + np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    h, w = views[0].depth.shape
    (folder / "metadata.json").write_text(json.dumps({"K": [*k.T.reshape(-1)], "h": h, "w": w, "poses": poses}))


def on_its_side(view):
    """As a phone that is held upright stores it: the image's top is to its right."""
    k, h = view.intrinsics, view.image.shape[0]
    turned = np.array([[k[1, 1], 0, h - 1 - k[1, 2]], [0, k[0, 0], k[0, 2]], [0, 0, 1]])
    pose = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]) @ view.cam_from_world
    image, depth = (np.ascontiguousarray(np.rot90(picture, -1)) for picture in (view.image, view.depth))
    return View(image, depth, pose, turned)


def write_arkitscenes(folder, views):
    write_arkitscenes_as_stored(folder, [on_its_side(view) for view in views])


def write_arkitscenes_as_stored(folder, views):
    lines = []
    for i, view in enumerate(views):
        time = 41.25 + i / 10
        name = f"42_{time:.3f}"
        write_image(folder / "lowres_wide" / f"{name}.png", view.image)
        write_depth(folder / "lowres_depth" / f"{name}.png", view.depth, 1e-3)
        k, (h, w) = view.intrinsics, view.depth.shape
        path = folder / "lowres_wide_intrinsics" / f"42_{time + 0.001:.3f}.pincam"
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join(map(str, (w, h, k[0, 0], k[1, 1], k[0, 2] + 0.5, k[1, 2] + 0.5))))
        numbers = [*Rotation.from_matrix(view.cam_from_world[:, :3]).as_rotvec(), *view.cam_from_world[:, 3]]
        lines.append(f"{time} " + " ".join(f"{x:.12f}" for x in numbers))
    (folder / "lowres_wide.traj").write_text("\n".join(lines) + "\n")


def write_wai(folder, views):
    frames = []
    for i, view in enumerate(views):
        write_image(folder / "images" / f"{i:06d}.png", view.image)
        write_exr(folder / "rendered_depth" / f"{i:06d}.exr", view.depth)
        k = view.intrinsics
        frames.append(
            {
                "frame_name": f"{i:06d}",
                "image": f"images/{i:06d}.png",
                "rendered_depth": f"rendered_depth/{i:06d}.exr",
                "transform_matrix": view.world_from_cam.tolist(),
                "fl_x": k[0, 0],
                "fl_y": k[1, 1],
                "cx": k[0, 2] + 0.5,
                "cy": k[1, 2] + 0.5,
            }
        )
    modalities = {
        "pred_depth": {"frame_key": "no_such", "format": "depth"},
        "gt_depth": {"frame_key": "rendered_depth", "format": "depth"},
    }
    meta = {"camera_model": "PINHOLE", "camera_convention": "opencv", "h": views[0].image.shape[0]}
    meta |= {"w": views[0].image.shape[1], "frames": frames, "frame_modalities": modalities}
    (folder / "scene_meta.json").write_text(json.dumps(meta))


def write_colmap(folder, views, points=600):
    """By pycolmap, with points of the surfaces that at least three of the views see."""
    import pycolmap

    model = pycolmap.Reconstruction()
    rng = np.random.default_rng(0)
    world = np.concatenate([_some_points(rng, view, points // len(views) + 1) for view in views])
    seen = []
    for i, view in enumerate(views):
        k, (h, w) = view.intrinsics, view.depth.shape
        camera = pycolmap.Camera.create_from_model_name(i + 1, "PINHOLE", 1.0, w, h)
        camera.params = [k[0, 0], k[1, 1], k[0, 2] + 0.5, k[1, 2] + 0.5]
        model.add_camera_with_trivial_rig(camera)
        write_image(folder / "images" / f"{i:03d}.png", view.image)
        local = world @ view.cam_from_world[:, :3].T + view.cam_from_world[:, 3]
        pixels = local @ k.T
        pixels = pixels[:, :2] / pixels[:, 2:]
        x, y = np.rint(pixels).astype(int).T
        inside = (local[:, 2] > 0) & (x >= 0) & (y >= 0) & (x < w) & (y < h)
        depth = np.zeros(len(world))
        depth[inside] = view.depth[y[inside], x[inside]]
        visible = inside & (np.abs(depth - local[:, 2]) < 0.01 * local[:, 2])
        keypoints = pixels[visible] + 0.5
        image = pycolmap.Image(name=f"{i:03d}.png", keypoints=keypoints, camera_id=i + 1, image_id=i + 1)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(view.cam_from_world))
        seen.append(np.where(visible, np.cumsum(visible) - 1, -1))
    for number, point in enumerate(world):
        track = pycolmap.Track()
        for i, places in enumerate(seen):
            if places[number] >= 0:
                track.add_element(i + 1, int(places[number]))
        if track.length() >= 3:
            model.add_point3D(point, track, np.zeros(3, np.uint8))
    model.update_point_3d_errors()
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    model.write_binary(str(sparse))


def _some_points(rng, view, count):
    rows, columns = np.nonzero(view.depth)
    chosen = rng.choice(len(rows), count)
    rows, columns = rows[chosen], columns[chosen]
    rays = np.linalg.solve(view.intrinsics, np.stack([columns, rows, np.ones(count)]))
    local = np.vstack([rays * view.depth[rows, columns], np.ones(count)])
    return (view.world_from_cam @ local)[:3].T


def write_unified(folder, views):
    names = [f"{i:03d}.jpg" for i in range(len(views))]
    for name, view in zip(names, views, strict=True):
        write_image(folder / "images" / name, view.image)
        write_exr(folder / "depths" / f"{name[:3]}.exr", view.depth)
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
    header = "image,depth,r11,r12,r13,t1,r21,r22,r23,t2,r31,r32,r33,t3,fx,fy,cx,cy"
    with (folder / "frames.csv").open("w", newline="") as file:
        file.write(header + "\n")
        csv.writer(file).writerows(rows)


WRITERS = {
    "nerfstudio": write_nerfstudio,
    "polycam": write_polycam,
    "record3d": write_record3d,
    "arkitscenes": write_arkitscenes,
    "wai": write_wai,
    "sevenscenes": write_sevenscenes,
    "tum": write_tum,
    "scannet": write_scannet,
    "unified": write_unified,
    "frames": write_frames,
}
ALL = WRITERS | {"colmap": write_colmap}  # whose depth is sparse
