"""What is drawn and how: SAPIEN's rasteriser instead of ray tracing, chosen shadows, only the cameras asked for.

The runtime is not edited: while it builds its scene, SAPIEN's renderer settings are redirected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import unknown_name
from physisforcing.core.types import CameraSpec

from .shaders import shader_folder

#: Our camera names -> names of the runtime's cameras.
CAMERAS = {"head": "head_camera", "left_wrist": "left_camera", "right_wrist": "right_camera"}
#: ``all`` is upstream's choice (one directional and two point lights with 2048-pixel maps). Point-light shadows are
#: cube maps: six drawings of the scene each, and four fifths of the drawing time on a CPU.
SHADOWS = ("directional", "all", "none")
#: Upstream's directional shadow map has 2048 pixels for 20 m. The scene fits into 5 m around the same centre: 512 pixels
#: of the same size draw the same picture (``tests/sim/test_renderer.py``).
SHADOW_HALF_SIZE, SHADOW_PIXELS = 2.5, 512


_kept: list[Any] = []


def keep_renderer() -> None:
    """Keep SAPIEN's renderer for the life of the process.

    It is shared by all scenes and dropped with the last one; the next environment would compile all shaders again,
    which takes seconds on a software driver.
    """
    if not _kept:
        import sapien

        _kept.append(sapien.render.RenderSystem())


def check_shadows(shadows: str) -> str:
    if shadows not in SHADOWS:
        raise unknown_name("shadows", shadows, SHADOWS, see="envs/robotwin/renderer.py")
    return shadows


@contextlib.contextmanager
def rasterised(shadows: str) -> Iterator[None]:
    """While active, ray-tracing requests select the rasteriser, lights get the shadows that ``shadows`` says, and
    environment maps are refused (``shaders``)."""
    import sapien

    render, scene_class = sapien.render, sapien.Scene
    names = (
        "set_camera_shader_dir",
        "set_ray_tracing_samples_per_pixel",
        "set_ray_tracing_path_depth",
        "set_ray_tracing_denoiser",
    )
    kept = {name: getattr(render, name) for name in names}
    lights = {name: getattr(scene_class, name) for name in ("add_point_light", "add_directional_light")}
    maps = {name: getattr(scene_class, name) for name in ("set_environment_map", "set_environment_map_from_files")}
    casts = {"add_point_light": shadows == "all", "add_directional_light": shadows != "none"}

    def light(name: str) -> Any:
        def add(self: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs["shadow"] = casts[name]
            if name == "add_directional_light" and shadows == "directional":
                kwargs |= {"shadow_scale": SHADOW_HALF_SIZE, "shadow_map_size": SHADOW_PIXELS}
            return lights[name](self, *args, **kwargs)

        return add

    def no_map(*_: object, **__: object) -> None:
        raise RuntimeError("a scene with an environment map: envs/robotwin/shaders.py draws without its light")

    kept["set_camera_shader_dir"](shader_folder())
    for name in names:
        setattr(render, name, lambda *_: None)
    for name in lights:
        setattr(scene_class, name, light(name))
    for name in maps:
        setattr(scene_class, name, no_map)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(render, name, function)
        for name, function in (lights | maps).items():
            setattr(scene_class, name, function)


class OnDemandCamera:
    """A camera of RoboTwin's rig that the renderer builds when somebody first asks for more than its place.

    RoboTwin makes seven or eight cameras in every scene and an episode draws one. The entity that carries the camera is
    there from the start, so that the numbers of bodies do not depend on which cameras are drawn.
    """

    def __init__(self, scene: Any, name: str, **lens: Any) -> None:
        import sapien

        self.name, self.entity = name, sapien.Entity()
        self._scene, self._lens = scene, lens
        self._camera: Any = None
        scene.add_entity(self.entity)
        self.entity.name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if self._camera is None:
            import sapien

            lens = self._lens
            camera = sapien.render.RenderCameraComponent(lens["width"], lens["height"])
            camera.set_fovy(lens["fovy"], compute_x=True)
            camera.near, camera.far, camera.name = lens["near"], lens["far"], self.name
            self.entity.add_component(camera)
            self._scene.update_render()  # tells the new camera where it stands
            self._camera = camera
        return getattr(self._camera, attribute)


@contextlib.contextmanager
def cameras_on_demand(scene: Any) -> Iterator[None]:
    """While active, ``scene.add_camera`` gives an ``OnDemandCamera``."""

    def add_camera(name: str, width: int, height: int, fovy: float, near: float, far: float) -> OnDemandCamera:
        return OnDemandCamera(scene, name, width=width, height=height, fovy=fovy, near=near, far=far)

    scene.add_camera = add_camera
    try:
        yield
    finally:
        del scene.add_camera


class Pictures:
    """Draws the requested cameras of one built task."""

    def __init__(self, task: Any, cameras: tuple[str, ...]) -> None:
        self._task = task
        rig = task.cameras
        static = dict(zip(rig.static_camera_name, rig.static_camera_list, strict=True))
        wrist = {"left_camera": rig.left_camera, "right_camera": rig.right_camera}
        found = {**static, **wrist}
        self.cameras = {name: found[CAMERAS[name]] for name in cameras}

    def draw(self) -> None:
        """Bring the render scene up to date and start one picture with every requested camera; reading one waits for it."""
        if not self.cameras:
            return
        task = self._task
        if any(name != "head" for name in self.cameras):
            task.cameras.update_wrist_camera(task.robot.left_camera.get_pose(), task.robot.right_camera.get_pose())
        task.scene.update_render()
        for camera in self.cameras.values():
            camera.take_picture()

    def rgb(self, name: str) -> NDArray[np.uint8]:
        """uint8 [H,W,3] of the last ``draw``."""
        colour_HW4 = self.cameras[name].get_picture("Color")
        return (colour_HW4[..., :3] * 255).clip(0, 255).astype(np.uint8)

    def depth(self, name: str) -> NDArray[np.uint16]:
        """Distance along the optical axis in mm, uint16 [H,W]; 0 where nothing was hit, at most 65535."""
        metres_HW = -self.cameras[name].get_picture("Position")[..., 2]
        return np.rint(metres_HW * 1000).clip(0, 65535).astype(np.uint16)

    def body_ids(self, name: str) -> NDArray[np.uint16]:
        """Id of the rigid body in each pixel (as in ``body_poses``), uint16 [H,W]; 0 where nothing was hit."""
        return np.asarray(self.cameras[name].get_picture("Segmentation")[..., 1]).astype(np.uint16)

    def specs(self) -> list[CameraSpec]:
        """Cameras as of the last ``draw`` (wrist cameras move)."""
        specs = []
        for name, camera in self.cameras.items():
            intrinsics_33 = np.asarray(camera.get_intrinsic_matrix(), dtype=np.float64).copy()
            intrinsics_33[:2, 2] -= 0.5  # SAPIEN puts integers at pixel corners, we at pixel centres
            world_to_camera_44 = np.eye(4)
            world_to_camera_44[:3] = np.asarray(camera.get_extrinsic_matrix(), dtype=np.float64)[:3]
            specs.append(
                CameraSpec(
                    name=name,
                    height=camera.height,
                    width=camera.width,
                    intrinsics_33=intrinsics_33,
                    world_to_camera_44=world_to_camera_44,
                )
            )
        return specs
