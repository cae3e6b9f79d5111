_base_ = './lors-adamixer_r50_8xb2-crop-ms-480-800-3x_coco.py'

model = dict(query_generator=dict(num_queries=300))
